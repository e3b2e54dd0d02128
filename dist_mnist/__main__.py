"""Run the `dist-mnist` command as `python -m dist_mnist`."""

from dist_mnist.cli.app import main

main()
