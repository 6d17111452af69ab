# Soli on a CPU: docker build -t soli . && docker run -p 8000:8000 -e SOLI_API_KEY=secret soli
# Another verb: docker run soli translate "He drank a cup of tea."
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make
COPY . /checkout
WORKDIR /checkout
RUN make wheel TORCH_INDEX="$TORCH_INDEX"

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=build /checkout/dist /wheels
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11"
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
RUN useradd --create-home soli
USER soli
EXPOSE 8000
ENTRYPOINT ["soli"]
CMD ["serve", "--host", "0.0.0.0"]
