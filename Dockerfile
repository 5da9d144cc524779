# docker build -t star-kernels .                              CPU kernels; operators run in Triton on a GPU that is there
# docker build --build-arg KIND=cuda -t star-kernels:cuda .   GPU kernels too; run with --gpus all
ARG KIND=cpu

FROM ubuntu:24.04 AS cpu
ENV STAR_CUDA=0

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda
ENV STAR_CUDA=1

FROM ${KIND}
# Which GPUs to build for, for instance "8.0;9.0"; empty: all of a release.
ARG TORCH_CUDA_ARCH_LIST
# The compiler stays: Triton and torch.compile call it.
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/star
ENV PATH=/opt/star/bin:$PATH
WORKDIR /opt/star/source
# Before the sources, so that a change of theirs installs no torch again.
COPY requirements-ci.txt .
RUN pip install --no-cache-dir -c requirements-ci.txt torch setuptools wheel ninja pybind11
COPY . .
RUN pip install --no-cache-dir --no-build-isolation -c requirements-ci.txt '.[train,rewards]'
WORKDIR /work
RUN star info
CMD ["star", "--help"]
