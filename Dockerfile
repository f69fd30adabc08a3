# docker build --build-arg EXTRAS=cuda -t ntjax .
# docker run --rm --gpus all -v "$PWD:/work" -v ntjax-cache:/home/ntjax/.cache ntjax train --config sft.toml
# On a TPU VM: EXTRAS=tpu, and --privileged --net=host in place of --gpus all.
#
# EXTRAS: cuda, tpu, or several with commas (cuda,rewards,wandb); left empty, ntjax runs on CPUs. There are no weights in
# the image: models come from the hub into the cache volume, or from a folder that is mounted.

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY ntjax ntjax
ARG EXTRAS=""
RUN python -m venv /opt/ntjax \
    && /opt/ntjax/bin/pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 ntjax \
    && install --directory --owner=ntjax --group=ntjax /work /home/ntjax/.cache
COPY --from=build /opt/ntjax /opt/ntjax
ENV PATH="/opt/ntjax/bin:$PATH" PYTHONUNBUFFERED=1
USER ntjax
WORKDIR /work
ENTRYPOINT ["ntjax"]
CMD ["--help"]
