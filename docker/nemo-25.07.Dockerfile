# NVIDIA's NeMo Framework 25.07 with this suite in it. From the top of the repository:
#   docker build -f docker/nemo-25.07.Dockerfile -t nemo-minitron:25.07 .
ARG IMAGE=nvcr.io/nvidia/nemo:25.07
FROM ${IMAGE}

COPY pyproject.toml README.md LICENSE /opt/nemo-minitron/
COPY nemo_minitron /opt/nemo-minitron/nemo_minitron
COPY configs /opt/nemo-minitron/configs
COPY recipes /opt/nemo-minitron/recipes

# Every version that the image holds is a constraint, so that nothing of it is replaced.
RUN python -m pip list --format=freeze --exclude pip > /opt/nemo-minitron/image.txt
RUN python -m pip install --no-cache-dir -c /opt/nemo-minitron/image.txt "/opt/nemo-minitron[data,gguf,harness,report]" jsonlines
# Not in the image from 25.07 on. --no-deps: its range for Jinja2 must not move the image's.
RUN python -m pip install --no-cache-dir --no-deps nemo-aligner==0.7.0
RUN minitron --help > /dev/null
