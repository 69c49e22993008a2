"""`ssl-jax evaluate` for launch scripts: python eval.py --workdir=DIR --protocol=linear_quick"""

import sys

from ssl_jax.cli import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
