# The verifier: tokenizers and scorers, without torch.
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
COPY deploy/requirements/verifier.txt ./
RUN pip install --no-cache-dir --no-deps setuptools==78.1.1 \
    && pip install --no-cache-dir --no-deps -r verifier.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && pip uninstall --yes setuptools pip

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp isentrope \
    && install --directory --owner=isentrope --group=isentrope /data
COPY --from=build /opt/isentrope /opt/isentrope
ENV PATH=/opt/isentrope/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
WORKDIR /data
USER 10001:10001
CMD ["python", "-m", "services.verifier", "--help"]
