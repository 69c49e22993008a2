"""`ssl-jax pretrain` for launch scripts: python train.py byol IMAGES --workdir=RUN"""

import sys

from ssl_jax.cli import start

if __name__ == "__main__":
    sys.exit(start("pretrain"))
