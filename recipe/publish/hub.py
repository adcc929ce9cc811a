"""A run's repository on the Hub: made private, recognised by its marker, changed only by commits that say what they replace."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from recipe.config import first_line
from recipe.files import sha256
from recipe.publish.contents import MARKER, HubRecord
from recipe.publish.redaction import redact

MAIN = "main"
LONGEST_PAUSE = 60
"""Seconds between two attempts, at most, unless the Hub asks for more."""


class HubError(RuntimeError):
    """The Hub does not do what was asked; the message says why and what to do, without tokens.

    Attributes:
        passing: whether it may pass by itself: no connection, too many requests, a fault of the server.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(self, message: str, passing: bool = False, retry_after: float = 0):
        super().__init__(redact(message))
        self.passing, self.retry_after = passing, retry_after


class Pushed(NamedTuple):
    """What a push has come to."""

    commit: str
    """Full sha of the branch's head."""
    changed: bool
    """Whether there was anything to commit."""


def retrying(action: Callable[[], Any], patience: float, say: Callable[[str], None]) -> Any:
    """The result of `action`, tried again for `patience` seconds while its HubError may pass by itself."""
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            return action()
        except HubError as error:
            wait = max(pause, error.retry_after)
            if not error.passing or time.monotonic() + wait > deadline:
                raise
            say(f"{error}; again in {wait:.0f} s")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


class HubRepo:
    """A model repository that a run pushes to.

    Args:
        name: USER/NAME.
        private: what it has to be, or be made; nothing is pushed to a public one if this is set.
        into_existing: push although another run or somebody else made it.
    """

    def __init__(self, name: str, record: HubRecord, private: bool = True, into_existing: bool = False):
        self.name, self._record, self._private, self._into_existing = name, record, private, into_existing
        self._api = HfApi(token=get_token() or False)

    def look(self) -> str:
        """What `prepare` would find and do, in a few words; nothing is changed.

        Raises:
            HubError: if it would refuse.
        """
        self._check_user()
        info = self._info()
        if info is None:
            return f"will be made, {'private' if self._private else 'public'}"
        self._is_claimed(info)
        return "there, and may be pushed to"

    def prepare(self) -> None:
        """See to it that the repository is there, ours and as private as asked, and mark it.

        Raises:
            HubError: if not; nothing was uploaded then.
        """
        self._check_user()
        info = self._info()
        if info is None:
            self._create()
            info = self._info()
        if info is None:
            raise HubError(f"{self.name} was made, and the Hub does not show it; try again", passing=True)
        if not self._is_claimed(info):
            self._claim(info.sha)

    def push(self, files: dict[str, Path], branch: str, message: str) -> Pushed:
        """Commit files, by their path in the repository, to a branch, which is made from main if it is not there. Nothing is
        deleted; files that are there with the same content make no commit.

        Raises:
            HubError: if that fails, or another commit came in between; the branch is as it was then.
        """
        head = self._head(branch)
        self._refuse_edited(files, branch, head)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
        return self._commit(operations, branch, head, message)

    # --- requests -------------------------------------------------------------------------------------------------

    def _check_user(self) -> None:
        if not self._api.token:
            raise HubError("there is no access token: set HF_TOKEN, or give one to `hf auth login`")
        with self._explained("asking whose token this is"):
            user = self._api.whoami()
        namespace = self.name.partition("/")[0]
        known = {user["name"], *(organisation["name"] for organisation in user.get("orgs") or ())}
        if namespace.lower() not in {name.lower() for name in known}:
            raise HubError(f"{self.name}: the token is {user['name']}'s, who is not in {namespace}; write {user['name']}/NAME")
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(f"{self.name}: the token of {user['name']} may only read; make one that may write")

    def _info(self) -> Any | None:
        with self._explained(f"looking for {self.name}"):
            try:
                return self._api.repo_info(self.name)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None

    def _is_claimed(self, info: Any) -> bool:
        """Whether the repository has the marker or needs none; False if it is ours and new.

        Raises:
            HubError: if it is not to be pushed to.
        """
        if self._private and not info.private:
            raise HubError(
                f"{self.name} is public, and private was asked for: nothing was uploaded. Make it private in its settings on "
                "the Hub, or say that it is to be public (--public; hub_private false)"
            )
        names = {sibling.rfilename for sibling in info.siblings or ()}
        owner = self._owner(info.sha) if MARKER in names else None
        if self._record.is_mine(owner) or self._into_existing:
            return True
        if names <= {".gitattributes"} and self._record.created(self.name):
            return False
        whose = "another run" if owner else "something that this run did not make"
        raise HubError(
            f"{self.name} exists and holds {whose}: nothing was uploaded. Choose another name, or push over it with "
            "--into_existing (hub_into_existing true)"
        )

    def _create(self) -> None:
        self._record.creates(self.name)
        with self._explained(f"making {self.name}"):
            try:
                self._api.create_repo(self.name, private=self._private)
            except HfHubHTTPError as error:
                # 409: somebody made it in between. What it is, is looked at next.
                if error.response.status_code != 409:
                    raise

    def _owner(self, commit: str) -> str | None:
        """The run that the marker names, if it can be read."""
        with self._explained(f"reading {MARKER} of {self.name}"), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.name, MARKER, revision=commit, local_dir=folder)
            try:
                return json.loads(Path(path).read_text(encoding="utf-8"))["run_id"]
            except (ValueError, KeyError, TypeError):
                return None

    def _claim(self, head: str) -> None:
        marker = json.dumps({"run_id": self._record.run_id}) + "\n"
        operation = CommitOperationAdd(path_in_repo=MARKER, path_or_fileobj=marker.encode())
        self._commit([operation], MAIN, head, "Name the run that this repository is for")

    def _head(self, branch: str) -> str:
        with self._explained(f"looking for branch {branch} of {self.name}"):
            try:
                return self._api.repo_info(self.name, revision=branch).sha
            except RevisionNotFoundError:
                self._api.create_branch(self.name, branch=branch, exist_ok=True)
                return self._api.repo_info(self.name, revision=branch).sha

    def _refuse_edited(self, files: dict[str, Path], branch: str, head: str) -> None:
        last = self._record.pushed(self.name, branch)
        if last in (None, head) or self._into_existing:
            return
        with self._explained(f"comparing {branch} of {self.name} with the last push"):
            before, now = ({file.path: file for file in self._files(files, commit)} for commit in (last, head))
        # Ours, but for the answer that was lost, is what holds the very content that is to be pushed.
        differing = [n for n in files if n in now and (n not in before or before[n].blob_id != now[n].blob_id)]
        edited = sorted(name for name in differing if not _is_same(files[name], now[name]))
        if edited:
            raise HubError(
                f"{self.name}: {', '.join(edited)} on {branch} changed since the last push from here: nothing was uploaded. "
                "--into_existing (hub_into_existing true) replaces them"
            )

    def _files(self, files: dict[str, Path], commit: str) -> list[RepoFile]:
        try:
            return [f for f in self._api.get_paths_info(self.name, list(files), revision=commit) if isinstance(f, RepoFile)]
        except RevisionNotFoundError:  # its history was rewritten
            return []

    def _commit(self, operations: list[CommitOperationAdd], branch: str, head: str, message: str) -> Pushed:
        with self._explained(f"uploading to {branch} of {self.name}"):
            done = self._api.create_commit(self.name, operations, commit_message=message, revision=branch, parent_commit=head)
        self._record.note_push(self.name, branch, done.oid)
        return Pushed(done.oid, done.oid != head)

    @contextmanager
    def _explained(self, doing: str):
        """Make a HubError of what the client raises."""
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise HubError(f"{doing}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
        except HfHubHTTPError as error:
            raise self._refusal(doing, error) from error
        except (HTTPError, ConnectionError, TimeoutError) as error:
            raise HubError(f"{doing}: the Hub cannot be reached ({first_line(error)})", passing=True) from error
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, HubError):
                raise
            raise HubError(f"{doing}: {first_line(error)}") from error

    def _refusal(self, doing: str, error: HfHubHTTPError) -> HubError:
        status = error.response.status_code
        if status == 401:
            return HubError(f"{doing}: the Hub does not take the access token (401); renew it with `hf auth login` or HF_TOKEN")
        if status == 403:
            return HubError(f"{doing}: the token may not write there (403); give one that may write to {self.name}")
        if status == 409:
            return HubError(f"{doing}: something is in the way on the Hub (409: {error.server_message or 'no reason given'})")
        if status == 412:
            return HubError(f"{doing}: somebody else committed in between (412), nothing was changed; push again")
        if status == 429 or status >= 500:
            return HubError(f"{doing}: the Hub answers {status}", passing=True, retry_after=_retry_after(error))
        return HubError(f"{doing}: the Hub answers {status}: {error.server_message or first_line(error)}")


def _is_same(path: Path, file: RepoFile) -> bool:
    if file.lfs is not None:
        return sha256(path) == file.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


def _retry_after(error: HfHubHTTPError) -> float:
    value = error.response.headers.get("Retry-After", "").strip()
    return float(value) if value.isascii() and value.isdigit() else 0.0
