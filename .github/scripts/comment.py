"""Put what `validate` found into one comment of its pull request, updated in place. Kept by `appliance init`.

Runs in `report.yml`, beside a token that may write: the finding comes from the pull request's own
code and is treated as data. It is read from the run's log, must have the expected form, and every
word of it is shown as code, so that nothing in it is rendered, linked or mentioned. Needs only Python.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from typing import Any

MARKER = "<!-- appliance-report -->"
BOT = "github-actions[bot]"
LIMIT = 60_000  # GitHub takes 65,536 characters
_LINE = re.compile(r"(?:^|\s)appliance-report: ([A-Za-z0-9+/=]+)\s*$")
_MOST = 4 << 20


class _NoToken(urllib.request.HTTPRedirectHandler):
    """Logs are served from elsewhere: the token does not go there."""

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        """The redirected request without `Authorization`."""
        request = super().redirect_request(*arguments)
        if request is not None:
            request.remove_header("Authorization")
        return request


def call(path: str, *, method: str = "GET", body: dict[str, str] | None = None) -> bytes:
    """One request to the API."""
    request = urllib.request.Request(  # noqa: S310 - the runner's own API address
        os.environ.get("GITHUB_API_URL", "https://api.github.com") + path,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.build_opener(_NoToken).open(request, timeout=60) as answer:
        content: bytes = answer.read(64 << 20)
        return content


def read_finding(repository: str, run: int) -> dict[str, Any] | None:
    """What the jobs of a run wrote into their logs, `None` when there is nothing that can be read."""
    jobs = json.loads(call(f"/repos/{repository}/actions/runs/{run}/jobs?per_page=100"))["jobs"]
    for job in jobs:
        log = call(f"/repos/{repository}/actions/jobs/{int(job['id'])}/logs").decode("utf-8", "replace")
        found = [m[1] for m in map(_LINE.search, log.splitlines()) if m]
        if found:
            return decode_finding("".join(found))
    return None


def decode_finding(text: str) -> dict[str, Any] | None:
    """The JSON object behind base64 and gzip, `None` for anything else."""
    try:
        value = json.loads(zlib.decompressobj(31).decompress(base64.b64decode(text, validate=True), _MOST))
    except (ValueError, zlib.error, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def render(finding: dict[str, Any] | None, *, head: str, url: str) -> str:
    """The comment: sections of tables and lines, all of it as code, cut at GitHub's limit."""
    lines = [MARKER, "## Recipes and data", "", f"For {show(head[:12])}, from [this run]({url})."]
    if finding is None:
        lines += ["", "The run left no report; its log says why."]
    for section in (finding or {}).get("sections", [])[:20]:
        lines += ["", f"### {show(section.get('title', ''))}", ""]
        columns = section.get("columns", [])[:10]
        if columns and section.get("rows"):
            lines += [f"| {' | '.join(map(show, columns))} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(map(show, row[:10]))} |" for row in section["rows"][:100]]
        lines += [f"- {show(line)}" for line in section.get("lines", [])[:100]]
    text = "\n".join(lines)
    return text if len(text) <= LIMIT else text[: text.rindex("\n", 0, LIMIT)] + "\n\n... the rest is in the run.\n"


def show(value: object) -> str:
    """Any value as code spans that fit a table cell."""
    lines = [" ".join(line.split()) for line in str(value).splitlines()][:20]
    return "<br>".join(f"`{line[:500].replace('`', chr(39)).replace('|', '¦')}`" for line in lines if line)


def find_pull(repository: str, *, owner: str, branch: str, head: str) -> int | None:
    """The open pull request whose newest commit is the one that was validated; others are out of date."""
    query = urllib.parse.urlencode({"state": "open", "per_page": "100", "head": f"{owner}:{branch}"})
    pulls = json.loads(call(f"/repos/{repository}/pulls?{query}"))
    return next((int(p["number"]) for p in pulls if p["head"]["sha"] == head), None)


def find_comment(repository: str, pull: int) -> int | None:
    """Our own comment; the marker in another's comment does not make it ours."""
    for page in range(1, 31):
        comments = json.loads(call(f"/repos/{repository}/issues/{pull}/comments?per_page=100&page={page}"))
        for comment in comments:
            author, body = (comment["user"] or {}).get("login"), comment["body"] or ""  # both may be null
            if author == BOT and body.startswith(MARKER):
                return int(comment["id"])
        if len(comments) < 100:
            return None
    return None


def main() -> int:
    """Find the pull request, then update or make the comment."""
    repository, head = os.environ["GITHUB_REPOSITORY"], os.environ["HEAD_SHA"]
    pull = find_pull(repository, owner=os.environ["HEAD_OWNER"], branch=os.environ["HEAD_BRANCH"], head=head)
    if pull is None:
        sys.stdout.write(f"no open pull request has {head[:12]} as its newest commit; nothing to say\n")
        return 0
    try:
        text = render(read_finding(repository, int(os.environ["RUN_ID"])), head=head, url=os.environ["RUN_URL"])
    except (AttributeError, TypeError, KeyError):  # valid JSON of another form
        text = render(None, head=head, url=os.environ["RUN_URL"])
    comment = find_comment(repository, pull)
    if comment is None:
        call(f"/repos/{repository}/issues/{pull}/comments", method="POST", body={"body": text})
    else:
        call(f"/repos/{repository}/issues/comments/{comment}", method="PATCH", body={"body": text})
    sys.stdout.write(f"comment on #{pull} {'made' if comment is None else 'updated'}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except urllib.error.HTTPError as fault:
        sys.exit(f"error: {fault.url}: HTTP {fault.code} {fault.reason}")
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as fault:  # no connection, or half an answer
        sys.exit(f"error: no answer from the API: {fault}; run this job again")
