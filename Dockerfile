# The demo on a CPU:  docker build -t orthogonalize . && docker run --rm -v "$PWD/demo:/demo" orthogonalize
# Everything else:    docker run --rm -v "$PWD:/work" -w /work orthogonalize extract MODEL ...
FROM python:3.11-slim

# numba and torch compile nothing here; vLLM's CPU build and torch.compile need a compiler and NUMA's library.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/orthogonalize
COPY pyproject.toml README.md LICENSE Makefile ./
COPY orthogonalize ./orthogonalize

# The Makefile pins vLLM's CPU build and the torch that it was built against, which is in PyTorch's own index.
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN make setup

ENV PATH=/opt/orthogonalize/.venv/bin:$PATH
ENTRYPOINT ["orthogonalize"]
CMD ["demo", "--out", "/demo/result"]
