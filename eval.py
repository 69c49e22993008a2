"""`ssl-jax evaluate` for launch scripts: python eval.py --workdir=DIR --protocol=linear"""

import sys

from ssl_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
