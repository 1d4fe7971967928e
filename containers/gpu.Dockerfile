# The package with CUDA kernels and TensorRT for desktop and server GPUs, x86-64.
# Runs with `docker run --gpus all`; the driver comes from the host.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv
COPY . /source
ENV ZSSEG_CUDA=ON ZSSEG_CUDA_ARCHITECTURES=ALL
RUN python3 -m venv /zsseg && /zsseg/bin/pip install --no-cache-dir '/source[tensorrt,stream,serve]'

FROM ubuntu:24.04
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
  && rm -rf /var/lib/apt/lists/*
COPY --from=build /zsseg /zsseg
ENV PATH=/zsseg/bin:$PATH ZSSEG_HOME=/cache
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
RUN install -d -o ubuntu /cache /data
USER 1000
WORKDIR /data
RUN zsseg-rt segment --demo --device cpu --out /tmp/demo
ENTRYPOINT ["zsseg-rt"]
CMD ["doctor"]
