"""`python -m dist_mnist` is `dist-mnist`."""

from dist_mnist.cli.app import main

main()
