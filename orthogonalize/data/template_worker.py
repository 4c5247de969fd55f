"""The process that renders chat templates: a script that `template_process` runs, with limits on memory and CPU time.

It reads requests from stdin and writes one answer per chat to stdout; both are lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from datetime import datetime
from typing import Any

MEMORY = 2**30  # bytes that rendering may allocate
LONGEST = 4 * 2**20  # characters that a chat may become
SECONDS = 30  # of CPU time per chat, after which the kernel ends the process, even if the parent is gone

# The date given to templates that write the current one; otherwise prompts, and results, would change at midnight.
# Llama 3's own template falls back to this date.
TODAY = datetime(2024, 7, 26)


def limit_memory() -> None:
    """Allow `MEMORY` bytes more than the process has now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def rendered(template: str, chat: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    """One chat as text, up to where the answer begins; exactly as transformers renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if "strftime_now" in template:
        arguments = {"strftime_now": TODAY.strftime} | arguments
    texts, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **arguments)
    return str(texts[0])


def answer(template: str, chat: list[dict[str, Any]], arguments: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with the reason that there is none."""
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
    try:
        text = rendered(template, chat, arguments)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY / 2**30:g} GiB of memory"}
    except RecursionError:
        return {"error": "it recurses too deeply"}
    except Exception as error:  # a template can raise anything
        return {"error": str(error)[:1000] or type(error).__name__}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text)} characters"}
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints
    rendered("{{ messages[0]['content'] }}", [{"role": "user", "content": "warm up"}], {})
    with suppress(OSError, ValueError):  # not Linux: the limits on time and size still hold
        limit_memory()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for chat in request["chats"]:
            print(json.dumps(answer(request["template"], chat, request["arguments"])), file=replies, flush=True)


if __name__ == "__main__":
    main()
