# One image for the API, the dispatcher, migrations and Ray's pods. As it stands for processors; for GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --tag merger:0.1.0-cuda .
# tests/helm/test_image.py runs these steps in a root of its own, where that is possible.
# No base of NVIDIA's: torch's CUDA wheels bring their libraries, the node's runtime the driver, and the device plugin says
# which GPUs a pod sees (a variable for all of them in the image would show every GPU to every pod).
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates
WORKDIR /build
RUN python3 -m venv /opt/merger
COPY constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt && /opt/merger/bin/pip install --requirement torch.txt --constraint constraints.txt --extra-index-url ${TORCH_INDEX}
COPY pyproject.toml README.md LICENSE ./
COPY merger merger
COPY workers workers
COPY api api
# Every version is that of constraints.txt; what it does not name is refused by the check of tests/helm/test_image.py.
RUN /opt/merger/bin/pip install --constraint constraints.txt '.[service,torch,objects,search,mergekit,telemetry]' && /opt/merger/bin/pip check
# Tests of libraries, and pip itself, are no part of a service.
RUN /opt/merger/bin/pip uninstall --yes pip && find /opt/merger -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} +

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="merger" org.opencontainers.image.version="${VERSION}" org.opencontainers.image.licenses="Apache-2.0" org.opencontainers.image.description="Make new model checkpoints out of old ones"
# bash, and ray on the path, are what KubeRay's own containers need; procps is Ray's.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 ca-certificates bash procps && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 merger && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash merger
# A login shell, which the operator may be told to use, sets a path of its own.
RUN echo 'PATH=/opt/merger/bin:$PATH' > /etc/profile.d/merger.sh
COPY --from=build /opt/merger /opt/merger
ENV PATH=/opt/merger/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 HOME=/home/merger
USER 1000:1000
WORKDIR /home/merger
EXPOSE 8080 8081
CMD ["merger", "--help"]
