"""Attacks a server over the tests' tiny ChatML model, and tells what it answered and whether anything was left behind.

Parts, all of them or those that are named:

    schemathesis  against its own OpenAPI document: no 5xx, and answers as documented (needs `pip install schemathesis`)
    malformed     --bodies of them, 16 at a time: no 5xx, every refusal an error object
    large         bodies of 32 MiB, announced and not: 413 soon
    slow          clients that send a head or a body slowly, or read nothing: cut off
    disconnects   at every stage of a request, streamed and not
    burst         200 connections at once: each is answered or told to come again
    memory        2000 requests: resident memory of the last half, and descriptors
    sigterm       with open streams: they end, new requests are refused, exit code 0
    kill          -9, and a new server on the same port answers

After each part a request is answered, and by the metrics nothing runs, waits or holds a slot. The last line is JSON;
the exit code is 1 if anything is not as it should be.

usage: python tests/benchmarks/server_fuzz.py [--bodies 10000] [--seed 0] [--json FILE] [PART ...]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from malformed import body
from server_process import ServerProcess, tiny_chat_model

MIB = 2**20
OPTIONS = (
    "--alias", "tiny", "--ctx", 512, "--threads", 1, "--parallel", 4, "--embeddings", "--pooling", "mean",
    "--request-timeout", 600, "--grace", 30, "--max-requests", 512,
)  # fmt: skip
# all but those that take every refusal of a value for a fault: schemas cannot tell which tokens a vocabulary has
CHECKS = ",".join((
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
))  # fmt: skip
Figures = dict[str, Any]


def chat(stream: bool = False, tokens: int = 8, **more: Any) -> Figures:
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "stream": stream, **more}


def is_error(answer: httpx.Response) -> bool:
    """Whether an answer is an error object as it should be."""
    try:
        return set(answer.json()["error"]) >= {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False


def malformed(server: ServerProcess, options: argparse.Namespace) -> Figures:
    """Send bodies that are mostly wrong."""
    counts: collections.Counter[int] = collections.Counter()
    bad: list[str] = []
    chance = random.Random(options.seed)

    async def worker(client: httpx.AsyncClient, left: list[int]) -> None:
        while left:
            left.pop()
            path, data = body(chance)
            try:
                answer = await client.post(path, content=data, headers={"Content-Type": "application/json"})
            except httpx.HTTPError as error:
                bad.append(f"{path} {data[:300]!r}: {error!r}")
                continue
            counts[answer.status_code] += 1
            streamed = answer.headers["content-type"].startswith("text/event-stream")
            if answer.status_code >= 500 or (answer.status_code >= 400 and not is_error(answer)):
                bad.append(f"{answer.status_code} {path} {data[:3000]!r}: {answer.text[:300]}")
            elif streamed and '"code":"internal_error"' in answer.text.replace(" ", ""):
                bad.append(f"in a stream: {path} {data[:300]!r}: {answer.text[-300:]}")

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            left = [0] * options.bodies
            await asyncio.gather(*(worker(client, left) for _ in range(16)))

    asyncio.run(run())
    return {"statuses": dict(sorted(counts.items())), "bad": bad[:20], "ok": not bad}


def large(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """Send bodies of 32 MiB."""
    text = json.dumps(chat()).encode()[:-1] + b',"x":"' + b"y" * (32 * MIB) + b'"}'
    nested = b"[" * (32 * MIB)

    def parts(data: bytes) -> Any:
        yield from (data[start : start + MIB] for start in range(0, len(data), MIB))

    found = []
    for content in (text, nested, parts(text), parts(nested)):
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60)
        found.append({"status": answer.status_code, "seconds": round(time.perf_counter() - started, 3)})
    return {"answers": found, "ok": all(each["status"] == 413 and each["seconds"] < 5 for each in found)}


def head(data: bytes, path: str = "/v1/chat/completions") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return lines.encode()


def connect(server: ServerProcess, receive: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def slow(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """Trickle heads and bodies on 50 connections each, and read nothing of long answers on 20."""
    data = json.dumps(chat(stream=True, tokens=400, logprobs=True, top_logprobs=20)).encode()
    senders = [connect(server) for _ in range(100)]
    readers = [connect(server, receive=2048) for _ in range(20)]
    for reader in readers:
        reader.sendall(head(data) + data)
    whole = head(data) + data
    open_ones, started = list(enumerate(senders)), time.perf_counter()
    latency = 0.0
    sent = 0
    while open_ones and time.perf_counter() - started < 30:
        for place, sender in list(open_ones):
            begin = sent if place < 50 else (len(head(data)) if sent == 0 else len(head(data)) + sent)
            piece = whole[:begin] if place >= 50 and sent == 0 else whole[begin : begin + 1]
            try:
                sender.sendall(piece)
                sender.setblocking(False)
                if sender.recv(65536) == b"":
                    raise ConnectionError
            except BlockingIOError:
                sender.settimeout(30)
            except ConnectionError:
                open_ones.remove((place, sender))
            else:
                sender.settimeout(30)
        sent += 1
        asked = time.perf_counter()
        httpx.get(f"{server.url}/health", timeout=10).raise_for_status()
        latency = max(latency, time.perf_counter() - asked)
        time.sleep(0.2)
    seconds = time.perf_counter() - started
    left = server.settled()
    for connection in senders + readers:
        connection.close()
    return {
        "cut_off": 100 - len(open_ones),
        "seconds": round(seconds, 1),
        "health_max_s": round(latency, 3),
        "ok": not open_ones and latency < 3 and not any(left.values()),
    }


def disconnects(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """Leave at every stage, politely and not."""
    stages = 0
    for stream in (True, False):
        for path, given in (("/v1/chat/completions", chat(stream, 400)), ("/v1/embeddings", {"input": ["x"] * 200})):
            data = json.dumps(given).encode()
            whole = head(data, path) + data
            cuts = [0, 1, 20, len(whole) - len(data), len(whole) - len(data) // 2, len(whole)]
            for cut in cuts:
                for wait in (0.0, 0.01, 0.1):
                    for reset in (False, True):
                        connection = connect(server)
                        connection.sendall(whole[:cut])
                        time.sleep(wait)
                        if cut == len(whole) and wait and stream:
                            connection.recv(100)
                        if reset:
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        connection.close()
                        stages += 1
    return {"disconnects": stages, "ok": True}


def burst(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """Open 200 connections at once, each with a stream."""

    async def one(client: httpx.AsyncClient) -> tuple[int, bool]:
        async with client.stream("POST", "/v1/chat/completions", json=chat(True, 16)) as answer:
            text = (await answer.aread()).decode()
            if answer.status_code == 200:
                return 200, text.endswith("data: [DONE]\n\n")
            return answer.status_code, is_error(answer) and "retry-after" in answer.headers

    async def run() -> list[tuple[int, bool]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client) for _ in range(200)))

    answers = asyncio.run(run())
    counts = collections.Counter(status for status, _ in answers)
    return {"statuses": dict(sorted(counts.items())), "ok": all(fine for _, fine in answers) and counts[200] >= 60}


def memory(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """Ask 2000 times, 4 at a time."""
    marks: list[int] = []

    async def worker(client: httpx.AsyncClient, left: list[int]) -> None:
        while left:
            number = left.pop()
            given = chat(
                bool(number % 2), 8, logprobs=bool(number % 3), messages=[{"role": "user", "content": f"{number}" * 9}]
            )
            answer = await client.post("/v1/chat/completions", json=given)
            assert answer.status_code == 200, answer.text
            if number % 100 == 0:
                marks.append(server.rss)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            left = list(range(2000))
            await asyncio.gather(*(worker(client, left) for _ in range(4)))

    files = server.open_files
    asyncio.run(run())
    time.sleep(0.2)
    growth = marks[-1] - marks[len(marks) // 2]
    return {
        "mib": [round(mark / MIB, 1) for mark in marks],
        "growth_last_half_mib": round(growth / MIB, 2),
        "files": [files, server.open_files],
        "ok": growth < 4 * MIB and server.open_files <= files + 2,
    }


def sigterm(server: ServerProcess, _options: argparse.Namespace) -> Figures:
    """End it with open streams."""

    async def run() -> tuple[list[bool], int, bool]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            begun = asyncio.Semaphore(0)

            async def one() -> bool:
                async with client.stream("POST", "/v1/chat/completions", json=chat(True, 300)) as answer:
                    text = ""
                    async for part in answer.aiter_text():
                        if not text:
                            begun.release()
                        text += part
                    return text.endswith("data: [DONE]\n\n")

            streams = [asyncio.create_task(one()) for _ in range(4)]
            for _ in streams:
                await begun.acquire()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.02)
            refused = (await client.post("/v1/chat/completions", json=chat())).status_code == 503
            return await asyncio.gather(*streams), await asyncio.to_thread(server.process.wait, 60), refused

    whole, code, refused = asyncio.run(run())
    return {
        "streams_whole": sum(whole),
        "exit_code": code,
        "refused": refused,
        "ok": all(whole) and not code and refused,
    }


def schemathesis(server: ServerProcess, options: argparse.Namespace) -> Figures:
    """Let schemathesis read the OpenAPI document and try what it says."""
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
        f"{server.url}/openapi.json", "--checks", CHECKS, "--seed", options.seed, "--max-examples",
        options.examples, "--workers", 2, "--request-timeout", 600, "--phases", "examples,coverage,fuzzing",
        "--no-color", "--exclude-path", "/metrics", "--continue-on-failure", "--report-dir", options.work,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=options.work
    )
    if done.returncode:
        print(done.stdout[-20000:], done.stderr[-2000:])
    return {"summary": done.stdout.strip().splitlines()[-12:], "ok": done.returncode == 0}


PARTS: dict[str, Callable[[ServerProcess, argparse.Namespace], Figures]] = {
    part.__name__: part for part in (schemathesis, malformed, large, slow, disconnects, burst, memory, sigterm)
}


def alive(server: ServerProcess) -> bool:
    """Whether a request is answered and nothing is left of earlier ones."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat(), timeout=60)
    return answer.status_code == 200 and not any(server.settled().values())


def kill(model: Path) -> Figures:
    """Kill a server with open streams and start one on the same port."""
    with ServerProcess(model, *OPTIONS) as server:
        connection = connect(server)
        data = json.dumps(chat(True, 400)).encode()
        connection.sendall(head(data) + data)
        connection.recv(100)
        server.end(signal.SIGKILL)
        with ServerProcess(model, *OPTIONS, port=server.port) as again:
            fine = alive(again)
        connection.close()
    return {"ok": fine}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "kill"], metavar="PART")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis for an operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # clients have two seconds for everything
    os.environ.update({f"ZIGGURAT_{name}_TIMEOUT": "2" for name in ("HEAD", "BODY", "STALL")})
    wanted = options.parts or [*PARTS, "kill"]
    found: Figures = {}
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        model = tiny_chat_model(options.work)
        for name in wanted:
            started = time.perf_counter()
            if name == "kill":
                found[name] = kill(model)
            else:
                with ServerProcess(model, *OPTIONS) as server:
                    found[name] = PARTS[name](server, options)
                    if name != "sigterm":
                        found[name]["alive"] = alive(server)
                        found[name]["left"] = server.settled()
                        found[name]["ok"] &= found[name]["alive"]
                    found[name]["tracebacks"] = server.log().count('"traceback"')
                    found[name]["ok"] &= not found[name]["tracebacks"]
                    if not found[name]["ok"]:
                        lines = [line for line in server.log().splitlines() if '"traceback"' in line]
                        print("\n".join(lines[:5]), file=sys.stderr)
            found[name]["part_s"] = round(time.perf_counter() - started, 1)
            print(name, json.dumps(found[name]), flush=True)
    found["ok"] = all(each["ok"] for each in found.values())
    text = json.dumps(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(text)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
