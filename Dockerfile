# The recipe with CUDA's build of torch; the driver comes from the host (NVIDIA's container toolkit):
#
#   docker build -t gpt2-recipe .
#   docker run --init --gpus all --ipc=host -v "$PWD/runs:/recipe/runs" gpt2-recipe \
#     bash scripts/supervise.sh configs/accelerate/8xa100-zero1.yaml configs/gpt2-124m.yaml
#   docker run --rm gpt2-recipe python scripts/pretrain.py --help
#
# --ipc=host: NCCL's ranks share memory, of which a container has 64 MB. --init: a first process that takes note of every other's
# end. `docker stop --time 120` leaves time to save: the script hands the signal on to the ranks, where `accelerate launch` as a
# container's first process would not hear it.
FROM python:3.12-slim-bookworm

# Triton compiles its launchers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /recipe
# What changes seldom first: the packages are a layer of their own.
COPY constraints.txt setup.py setup.cfg README.md LICENSE ./
COPY recipe/__init__.py recipe/__init__.py
COPY scripts/install.sh scripts/install.sh
# torch first: install.sh takes the CPU's where it sees no GPU, as here.
RUN python -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir --quiet "$(grep '^torch==' constraints.txt)" \
    && PIP_NO_CACHE_DIR=1 bash scripts/install.sh .venv gpu
COPY recipe recipe
COPY configs configs
COPY scripts scripts

ENV PATH=/recipe/.venv/bin:$PATH
STOPSIGNAL SIGTERM
VOLUME /recipe/runs
CMD ["python", "scripts/pretrain.py", "--help"]
