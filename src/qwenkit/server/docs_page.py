"""/docs: the published schema as a page to read, without a script and without another server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import Request
from starlette.responses import HTMLResponse, Response

from qwenkit.server.route import group
from qwenkit.server.schema import published

router = group()
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0;
  border-top: 1px solid #ddd }
h2 code { font-size: 18px } .kind { color: #666 } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1a1a1a }
  pre { background: #2a2a2a } td, th { border-color: #444 } .kind { color: #aaa }
  a { color: #8ab4f8 } }
"""
_EXAMPLES: Mapping[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello!"}], "stream": True},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 40},
    "/v1/embeddings": {"input": ["a text", "another one"]},
    "/v1/responses": {"input": "Hello!"},
    "/tokenize": {"prompt": "Hello!"},
    "/detokenize": {"tokens": [0, 1]},
    "/api/chat": {"model": "default", "messages": [{"role": "user", "content": "Hello!"}]},
    "/api/generate": {"model": "default", "prompt": "Hello!"},
    "/api/show": {"model": "default"},
    "/api/embed": {"model": "default", "input": "a text"},
}


@router.get(
    "/docs",
    response_class=Response,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    summary="This page.",
)
async def docs(request: Request) -> Response:
    """What there is to ask, to read in a browser."""
    page = _page(await published(request), str(request.base_url).rstrip("/"))
    return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def _page(schema: Mapping[str, Any], address: str) -> str:
    info = schema["info"]
    parts = schema["components"]["schemas"]
    sections = [
        section
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
        for section in _section(path, method, operation, parts, address)
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info['summary'])} Errors are OpenAI's error object, whose <code>param</code> "
        'names the field. The whole as <a href="/openapi.json">OpenAPI</a>.</p>'
        f"{''.join(sections)}</html>"
    )


def _section(
    path: str, method: str, operation: Mapping[str, Any], parts: Mapping[str, Any], address: str
) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
    words = f"{operation.get('summary', '')} {operation.get('description', '')}"
    yield f"<p>{escape(words)}</p>"
    if path in _EXAMPLES:
        body = json.dumps(_EXAMPLES[path])
        yield f"<pre>curl {escape(address + path)} -d '{escape(body, quote=False)}'</pre>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None:
        name = content["schema"]["$ref"].rpartition("/")[2]
        yield "<details><summary>Fields</summary><table>"
        yield from _rows(parts[name])
        yield "</table></details>"


def _rows(shape: Mapping[str, Any]) -> Iterator[str]:
    needed = shape.get("required", ())
    for name, field in shape["properties"].items():
        words = escape(field.get("description", ""))
        mark = " (needed)" if name in needed else ""
        yield (
            f"<tr><td><code>{escape(name)}</code>{mark}</td>"
            f'<td class="kind">{escape(_kind(field))}</td><td>{words}</td></tr>'
        )


def _kind(field: Mapping[str, Any]) -> str:
    """A field's type in few words."""
    if "anyOf" in field or "oneOf" in field:
        kinds = [_kind(one) for one in field.get("anyOf", field.get("oneOf"))]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field or "const" in field:
        return " or ".join(map(json.dumps, field.get("enum", [field.get("const")])))
    kind = str(field.get("type", "anything"))
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    bounds = "" if low is None and high is None else f" {low} to {high}"
    return kind + (bounds if high is None or high < 2**40 else "")
