# The project with its environment. `docker build -t stanet .`, then `docker run --rm stanet` does `make quickstart`;
# `docker build --target test -t stanet-test .` adds a browser and npm, and `docker run --rm stanet-test` does `make test`.
FROM debian:bookworm-slim AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates git make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /stanet
COPY . .
RUN make env

FROM base AS test
RUN apt-get update \
 && apt-get install -y --no-install-recommends chromium fonts-dejavu-core npm \
 && rm -rf /var/lib/apt/lists/*
CMD ["make", "test"]

FROM base
CMD ["make", "quickstart"]
