# The package for CPUs, x86-64 and aarch64; docs/install.md says how to build and run it.
FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /source
ENV ZSSEG_CUDA=OFF
RUN python -m venv /zsseg && /zsseg/bin/pip install --no-cache-dir '/source[stream,serve]'

FROM python:3.12-slim-bookworm
COPY --from=build /zsseg /zsseg
ENV PATH=/zsseg/bin:$PATH ZSSEG_HOME=/cache
RUN useradd --create-home --uid 1000 zsseg && install -d -o zsseg /cache /data
USER 1000
WORKDIR /data
RUN zsseg-rt segment --demo --out /tmp/demo
ENTRYPOINT ["zsseg-rt"]
CMD ["doctor"]
