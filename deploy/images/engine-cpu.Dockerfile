# Learner and rollout replica on CPUs: the demo's.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# Some packages are sources.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/isentrope
ENV PATH=/opt/isentrope/bin:$PATH
COPY deploy/requirements/cpu.txt deploy/requirements/lora.txt ./
# As in deploy/setup.sh: PyPI itself holds only torch's CUDA build.
RUN pip install --no-cache-dir --no-deps setuptools==78.1.1 \
    && { pip install --no-cache-dir --no-deps torch==2.13.0+cpu \
        || { pip install --no-cache-dir uv==0.13.8 \
            && uv pip install --no-cache --no-deps --torch-backend cpu torch==2.13.0; }; }
RUN pip install --no-cache-dir --no-deps -r cpu.txt \
    && pip install --no-cache-dir --no-deps --target /opt/isentrope/lora -r lora.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
# DeepSpeed and torch.compile call a C++ compiler where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp isentrope \
    && install --directory --owner=isentrope --group=isentrope /data
COPY --from=build /opt/isentrope /opt/isentrope
ENV PATH=/opt/isentrope/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /data
USER 10001:10001
CMD ["python", "-m", "services.learner", "--help"]
