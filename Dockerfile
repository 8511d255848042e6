# One image for all pods: router, Ray's head, workers, model download.
#
#   docker build -t twinring:0.1.0 .                                  CPUs
#   docker build -t twinring:0.1.0-cuda --build-arg VARIANT=cuda .    NVIDIA GPUs (torch brings CUDA's libraries along)

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG VARIANT=cpu
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/twinring
ENV PATH=/opt/twinring/bin:$PATH
# Before the sources, so that a change there costs no download. torch goes first: pip then keeps the build it finds.
COPY pyproject.toml ./
RUN case "$VARIANT" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=https://pypi.org/simple ;; \
        *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac && \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt && \
    pip install --index-url "$index" "$(grep '^torch==' requirements.txt)" && \
    pip install -r requirements.txt
COPY . .
RUN pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim-bookworm
LABEL org.opencontainers.image.title="twinring" org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update && \
    apt-get install --yes --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 twinring && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin twinring
COPY --from=build /opt/twinring /opt/twinring
# KubeRay's shell is a login shell, and forgets PATH.
RUN ln -s /opt/twinring/bin/twinring /opt/twinring/bin/ray /opt/twinring/bin/hf /usr/local/bin/
ENV PATH=/opt/twinring/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HEALTH_URL=http://127.0.0.1:8000/health
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; r.urlopen(os.environ['HEALTH_URL'], timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["tini", "--"]
# Beyond loopback the router asks for tenants: docker run -e TWINRING_TOKENS="me=$TOKEN" --shm-size=2g ...
CMD ["twinring", "serve", "--listen=0.0.0.0:50051", "--http=0.0.0.0:8000"]
