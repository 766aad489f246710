"""What the page does: each action reads the page's fields and yields updates of its components.

The conversation travels in a hidden field of the page, raw, and comes back with every action, so
this process keeps nothing of it: a page left open works on after a restart.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from qwenkit.errors import UsageError
from qwenkit.web import conversation as talk
from qwenkit.web.client import ChatServer
from qwenkit.web.conversation import Conversation
from qwenkit.web.export import KINDS, export
from qwenkit.web.following import SOONEST_S, Run, follow
from qwenkit.web.layout import Parts, labels, merged
from qwenkit.web.markdown import safe
from qwenkit.web.reply import Reply
from qwenkit.web.request import build, read_settings
from qwenkit.web.stored import from_json, from_plain, whole
from qwenkit.web.transcript import coming, transcript
from qwenkit.web.view import Updates, Values, View, placeholder
from qwenkit.web.words import known_language, script_words, word

_LINGER_S = 15.0
_KEEP_EVERY_S = 2.0  # a reply that is coming is put in the browser's storage this often


class Actions:
    """The behaviour of one page; `parts` are its components, `server` answers."""

    def __init__(self, parts: Parts, server: ChatServer, *, system: str = "") -> None:
        self._parts = parts
        self._view = View(parts, system=system)
        self._server = server
        self._runs: dict[str, Run] = {}

    def connect(self, page: gr.Blocks) -> None:
        """Bind the actions to the events of the page."""
        parts = self._parts
        inputs, outputs = parts.inputs(), parts.outputs()
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        free = {**quiet, "concurrency_limit": None}
        page.load(self.start, inputs=[parts.kept], outputs=outputs, **free)
        page.load(linger, inputs=None, outputs=None, **free)
        # Gradio drops or defers what is asked while an earlier one is not done; we know better.
        always = {**free, "trigger_mode": "multiple"}
        parts.message.submit(self.send, inputs=inputs, outputs=outputs, **always)
        parts.message.stop(self.stop, inputs=inputs, outputs=None, **free)
        parts.action.change(self.act, inputs=inputs, outputs=outputs, **always)
        last = {**free, "trigger_mode": "always_last"}
        numbers = [p.input for name, p in parts.settings.items() if name not in ("stop", "tools")]
        texts = [parts.settings["stop"].blur, parts.settings["tools"].blur, parts.system.blur]
        gr.on([*numbers, *texts, parts.model.input], self.keep, inputs, [parts.kept], **last)

    async def start(self, kept: Any, request: gr.Request) -> Updates:
        """The page has been opened: its language, its settings, the models of the server."""
        kept = kept if isinstance(kept, dict) else {}
        accepted = str(request.headers.get("accept-language", ""))
        language = known_language(kept.get("language"), accepted)
        parts = self._parts
        system = kept.get("system", self._view.system)
        begun = talk.begin(system)
        models = await self._models(language, str(kept.get("model") or ""))
        fresh = {c: gr.update(value=kept.get(name)) for name, c in parts.settings.items()}
        fresh |= {parts.system: gr.update(value=system), parts.language: language}
        tell = {"words": script_words(language), "ready": True}
        shown = self._view.shown(begun, language, keep=False, opened=True, tell=tell)
        ready = self._view.ready(begun, language)
        return merged((shown, labels(parts, language), fresh, ready, models))

    async def send(self, values: Values) -> AsyncIterator[Updates]:
        """What is written in the box is said, or takes the place of what is being changed."""
        language, parts, view = self._view.language(values), self._parts, self._view
        text, editing = whole(values[parts.message] or ""), values[parts.editing]
        tell = {"taken": values[parts.sent]}
        try:
            conversation = view.conversation(values)
            if self._is_answering(conversation):
                yield view.noted(word("busy", language))
                return
            must_answer = True
            if editing:
                conversation, must_answer = talk.edit(conversation, int(editing), text)
            elif not text.strip() and talk.pending_call(conversation) is None:
                return
            else:
                conversation = talk.say(conversation, text)
            if must_answer and talk.pending_call(conversation) is None:
                async for updates in self._answer(conversation, values, tell):
                    yield updates
            else:
                shown = view.shown(conversation, language, tell=tell)
                yield merged((shown, view.ready(conversation, language), view.emptied()))
        except UsageError as error:
            yield view.noted(str(error))

    async def stop(self, values: Values) -> None:
        """End the answer that is coming."""
        run = self._runs.get(self._view.conversation(values).id)
        if run is not None:
            run.stop.set()

    async def keep(self, values: Values) -> Any:
        """The settings have changed: the browser keeps them."""
        return self._view.kept(values, self._view.language(values))

    async def act(self, values: Values) -> AsyncIterator[Updates]:
        """What the page's script asks for: {"do": a name of `_SIMPLE` or below, …}."""
        parts, view = self._parts, self._view
        name: Any = None
        command: Any = None
        try:
            command = json.loads(values[parts.action] or "{}")
            conversation = view.conversation(values)
            name = command.get("do") if isinstance(command, dict) else None
            if name in _SWITCHES and conversation.id in self._runs:
                await self._runs[conversation.id].end()
            if name in ("regenerate", "edit", "undo", "rename") and self._is_answering(
                conversation
            ):
                yield view.noted(word("busy", view.language(values)))
            elif name == "regenerate":
                async for updates in self._answer(talk.without_reply(conversation), values, {}):
                    yield updates
            elif name == "models":
                yield await self._models(view.language(values), str(values[parts.model] or ""))
            elif name in _SIMPLE:
                yield _SIMPLE[name](view, conversation, command, values)
        except (UsageError, ValueError) as error:
            refused = {parts.signal: view.signal(**_asked(command))} if name in _SWITCHES else {}
            yield {**view.noted(str(error)), **refused}

    async def _answer(
        self, conversation: Conversation, values: Values, tell: Mapping[str, Any]
    ) -> AsyncIterator[Updates]:
        """Ask the server, and show what comes until it ends or is stopped. Raises UsageError.

        `tell` goes to the script with every update: Gradio passes over one when the next comes
        soon, so that only what all of them say is sure to arrive.
        """
        parts, view = self._parts, self._view
        language = view.language(values)
        model = str(values[parts.model] or "").strip()
        if not model:
            raise UsageError(word("no_model", language))
        conversation = replace(conversation, system=whole(values[parts.system] or ""))
        settings = read_settings(view.settings(values))
        request = build(conversation, model=model, settings=settings)
        run = self._runs[conversation.id] = Run()
        reply = Reply(model=model, started_s=time.monotonic())
        try:
            box = gr.update(value="", submit_btn=False, stop_btn=True)
            waiting = {parts.live: coming(reply.turn(), language=language)}
            shown = view.shown(conversation, language, is_answering=True, tell=tell)
            yield {**shown, **waiting, parts.message: box, parts.editing: "", parts.note: ""}
            async for updates in self._follow(request, reply, run, conversation, language, tell):
                yield updates
            conversation = talk.with_turn(conversation, reply.turn())
            shown = await asyncio.to_thread(view.shown, conversation, language, tell=tell)
            run.is_over = True  # who sees the end of it may go on at once
            yield merged((shown, view.ready(conversation, language)))
        finally:
            if self._runs.get(conversation.id) is run:
                del self._runs[conversation.id]
            run.done.set()

    def _is_answering(self, conversation: Conversation) -> bool:
        run = self._runs.get(conversation.id)
        return run is not None and not run.is_over

    async def _follow(
        self,
        request: dict[str, Any],
        reply: Reply,
        run: Run,
        conversation: Conversation,
        language: str,
        tell: Mapping[str, Any],
    ) -> AsyncIterator[Updates]:
        """What has come so far, now and then, until it ends; kept in the browser too."""
        kept_s = time.monotonic()
        pieces = self._server.stream(request)
        async for is_new in follow(pieces, reply, run, explain=self._explainer(language)):
            if not is_new:
                yield {}
                continue
            began_s, so_far = time.monotonic(), reply.turn()
            html = await asyncio.to_thread(coming, so_far, language=language)
            updates: Updates = {self._parts.live: html}
            if began_s - kept_s > _KEEP_EVERY_S:
                partial = replace(so_far, ended=so_far.ended or "stopped")
                so_long = talk.with_turn(conversation, partial)
                updates |= self._view.held(so_long, keep=True, tell=tell)
                kept_s = began_s
            yield updates
            run.pause_s = max(SOONEST_S, 4 * (time.monotonic() - began_s))

    def _explainer(self, language: str) -> Callable[[Exception], str]:
        return lambda error: self._server.explain(error, language)

    async def _models(self, language: str, wanted: str) -> Updates:
        """The models that the server has; the wanted one if it is there, else the first."""
        try:
            names = await self._server.models()
        except Exception as error:  # whatever a server or the network does, the page must stand
            return self._view.noted(self._server.explain(error, language))
        chosen = wanted if wanted in names else next(iter(names), wanted)
        update = gr.update(choices=list(names), value=chosen or None)
        note = self._view.noted("" if names else word("no_models", language))
        return {self._parts.model: update, **note}


async def linger() -> AsyncIterator[None]:
    """Never done, so that Gradio's stream of events to a page never closes.

    It closes the stream when nothing is pending, and an action that begins just then is never
    heard of again. A page that has gone ends this at the next turn.
    """
    while True:
        await asyncio.sleep(_LINGER_S)
        yield


# Actions that are done at once: (the view, the conversation, the script's command, the fields).


def _new(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    begun = talk.begin(values[view.parts.system] or "")
    return _opened(view, begun, command, values, keep=False)


def _open(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    return _opened(view, from_plain(command.get("conversation")), command, values, keep=False)


def _import(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    conversation = replace(from_json(str(command.get("text"))), id=talk.begin().id)
    return _opened(view, conversation, command, values, keep=True)


def _opened(
    view: View, conversation: Conversation, command: Values, values: Values, *, keep: bool
) -> Updates:
    """What is in the box stays: the script has emptied it, and more may have been written since."""
    language = view.language(values)
    shown = view.shown(conversation, language, keep=keep, opened=True, tell=_asked(command))
    system = {view.parts.system: gr.update(value=conversation.system)}
    return merged((shown, view.ready(conversation, language), system))


def _asked(command: Any) -> dict[str, Any]:
    """Says to the script which of its commands is done: it sends nothing until it knows."""
    number = command.get("number") if isinstance(command, dict) else None
    return {"asked": number} if isinstance(number, int) else {}


def _rename(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    conversation = talk.rename(before, whole(str(command.get("title", ""))))
    return view.held(conversation, keep=True)


def _edit(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    index, parts, language = int(command.get("index", -1)), view.parts, view.language(values)
    turn = talk.turn_at(before, index)
    words = safe(word("editing", language, number=index + 1))
    cancel = safe(word("cancel", language))
    button = f'<button type="button" class="q-do q-cancel">{cancel}</button>'
    hint = word("placeholder_edit", language)
    return {
        parts.editing: str(index),
        parts.note: f"<div>{words} {button}</div>",
        parts.message: gr.update(value=turn.text, placeholder=hint),
        parts.signal: view.signal(focus=True),
    }


def _cancel(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    return merged((view.ready(before, view.language(values)), view.emptied()))


def _undo(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    conversation, text = talk.undo(before)
    language = view.language(values)
    shown = view.shown(conversation, language, tell={"focus": True})
    back = {view.parts.message: gr.update(value=text)}
    return merged((shown, view.ready(conversation, language), back))


def _export(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    kind = str(command.get("kind"))
    if kind not in KINDS:
        raise UsageError(f"export: got {kind!r}; allowed: {', '.join(KINDS)}.")
    name, media_type, text = export(before, kind, language=view.language(values))
    quoted = json.dumps(text)  # one line of ASCII: a field would change line ends
    told = {"name": name, "type": media_type, "length": len(quoted)}
    return {view.parts.exported: quoted, view.parts.signal: view.signal(download=told)}


def _speak(view: View, before: Conversation, command: Values, values: Values) -> Updates:
    language, parts = known_language(command.get("language")), view.parts
    updates: Updates = {
        parts.language: language,
        parts.signal: view.signal(words=script_words(language)),
        parts.kept: view.kept(values, language),
        parts.past: transcript(before, language=language),
    }
    hint = {parts.message: gr.update(placeholder=placeholder(before, language))}
    return merged((updates, labels(parts, language), hint))


_SWITCHES = ("new", "open", "import")  # they put another conversation on the page
_SIMPLE: dict[str, Callable[[View, Conversation, Values, Values], Updates]] = {
    "new": _new,
    "open": _open,
    "import": _import,
    "rename": _rename,
    "edit": _edit,
    "cancel": _cancel,
    "undo": _undo,
    "export": _export,
    "language": _speak,
}
