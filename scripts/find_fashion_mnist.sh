#!/bin/sh
# Finds Fashion-MNIST for the demo: Debian's package, else installs it where that is allowed, else through TFDS.
# BIN: the folder of the python to use.
set -u
BIN=${BIN:-.venv/bin}
have() { "$BIN/python" -c "from ssl_jax.config import Data; from ssl_jax.data import open_source; open_source(Data(name=\"fashion_mnist\"))" 2>/dev/null; }

have && exit 0
if command -v apt-get >/dev/null; then
    echo "installing Debian's dataset-fashion-mnist"
    if [ "$(id -u)" = 0 ]; then SUDO=""; else SUDO="sudo -n"; fi
    { $SUDO apt-get install -y -qq dataset-fashion-mnist || { $SUDO apt-get update -qq && $SUDO apt-get install -y -qq dataset-fashion-mnist; }; } >/dev/null 2>&1
    have && exit 0
fi
echo "preparing fashion_mnist through TensorFlow Datasets (installs tensorflow)"
"$BIN/python" -m pip install --quiet tensorflow && "$BIN/python" -c "
import tensorflow_datasets as tfds
tfds.builder('fashion_mnist', file_format='array_record').download_and_prepare()" >/dev/null 2>&1
have && exit 0
echo "Fashion-MNIST not found: sudo apt-get install dataset-fashion-mnist, or put its four .gz files into ~/.cache/ssl_jax/fashion-mnist" >&2
exit 1
