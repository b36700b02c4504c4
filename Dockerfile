# The pinned stack on a CUDA image: docker build -t anymixer . && docker run --gpus all -it anymixer
FROM nvidia/cuda:12.6.3-runtime-ubuntu22.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-pip python3-dev gcc git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /anymixer
COPY . .
RUN pip install --no-cache-dir -r requirements.txt
CMD ["bash"]
