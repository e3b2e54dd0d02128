"""Requests to `dist-mnist serve` from many clients at once: errors, latency, throughput, and the server's memory.

    python tests/benchmarks/serving.py --ckpt runs/nb [--requests 1000] [--clients 20]

Each client keeps one connection open, sends a digit of 200 x 200 pixels (a PNG file), and waits for the answer before
the next. Memory is the server's resident set size after each tenth of the requests.
"""

import argparse
import http.client
import io
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
from PIL import Image

from dist_mnist.data.sources.synthetic import make_digits


def ask(url: str, pictures: list[bytes]) -> list[float]:
    """Send pictures one after the other over one connection; return the seconds of each request."""
    connection, seconds = http.client.HTTPConnection(urlsplit(url).netloc), []
    for picture in pictures:
        start = time.perf_counter()
        connection.request("POST", "/predict", picture, {"Content-Type": "image/png"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        seconds.append(time.perf_counter() - start)
        if response.status != 200 or "class" not in answer["predictions"][0]:
            raise SystemExit(f"{response.status}: {answer}")
    return seconds


def measure(url: str, pid: int, num_requests: int, num_clients: int) -> None:
    """Send all requests and print latency, throughput and memory."""
    pictures = []
    for image in make_digits(100, seed=0)[0]:
        Image.fromarray(255 - image).resize((200, 200)).save(file := io.BytesIO(), "PNG")
        pictures.append(file.getvalue())
    ask(url, pictures[:10])
    each, seconds, sizes = max(1, num_requests // num_clients // 10), [], []
    start, before = time.perf_counter(), psutil.Process(pid).cpu_times()
    with ThreadPoolExecutor(num_clients) as clients:
        while len(seconds) < num_requests:
            parts = [[pictures[(number + index) % 100] for index in range(each)] for number in range(num_clients)]
            seconds += [one for found in clients.map(ask, [url] * num_clients, parts) for one in found]
            sizes.append(psutil.Process(pid).memory_info().rss / 2**20)
    took, after = time.perf_counter() - start, psutil.Process(pid).cpu_times()
    cpu_ms = 1000 * (after.user + after.system - before.user - before.system) / len(seconds)
    p50, p99 = (1000 * statistics.quantiles(seconds, n=100)[at - 1] for at in (50, 99))
    print(
        f"{len(seconds)} requests from {num_clients} clients, no error: p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
        f"{len(seconds) / took:.0f} requests/s; {cpu_ms:.1f} ms of the server's CPU time each; memory "
        f"{', '.join(f'{size:.0f}' for size in sizes)} MiB"
    )


def main() -> None:
    """Start the server, measure, and stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    options = parser.parse_args()
    command = [sys.executable, "-m", "dist_mnist", "serve", "--ckpt", options.ckpt, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            if url := server.stdout.readline().strip():
                measure(url, server.pid, options.requests, options.clients)
        finally:
            server.terminate()
    sys.exit(server.returncode)


if __name__ == "__main__":
    main()
