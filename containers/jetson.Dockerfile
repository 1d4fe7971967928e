# The package for Jetson Orin with JetPack 6: its CUDA 12.6, TensorRT 10.3 and Python 3.10.
# Build it on the board, and run it with `docker run --runtime nvidia`.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
  python3-libnvinfer python3-gi gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 \
  gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
  gstreamer1.0-plugins-ugly gstreamer1.0-libav nvidia-l4t-gstreamer \
  && rm -rf /var/lib/apt/lists/*
COPY . /source
ENV ZSSEG_CUDA=ON ZSSEG_CUDA_ARCHITECTURES=87
ENV PATH=/zsseg/bin:/usr/local/cuda/bin:$PATH ZSSEG_HOME=/cache
RUN python3 -m venv --system-site-packages /zsseg \
  && /zsseg/bin/pip install --no-cache-dir '/source[stream,serve]' \
  && useradd --create-home --uid 1000 --groups video zsseg && install -d -o zsseg /cache /data
USER 1000
WORKDIR /data
RUN zsseg-rt segment --demo --device cpu --out /tmp/demo
ENTRYPOINT ["zsseg-rt"]
CMD ["doctor"]
