# The pinned stack of constraints.txt on a plain CUDA image. From the top of the repository:
#   docker build -f docker/cuda.Dockerfile -t nemo-minitron:cuda .
# torch's wheels bring CUDA's libraries; the compiler is for Megatron-core's helpers and for Triton's kernels.
ARG IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}

COPY pyproject.toml constraints.txt README.md LICENSE /opt/nemo-minitron/
COPY nemo_minitron /opt/nemo-minitron/nemo_minitron
COPY configs /opt/nemo-minitron/configs
COPY recipes /opt/nemo-minitron/recipes

RUN python -m pip install --no-cache-dir -c /opt/nemo-minitron/constraints.txt "/opt/nemo-minitron[stack]"
RUN python -m pip check
RUN minitron --help > /dev/null
