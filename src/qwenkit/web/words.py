"""Every word that the page says, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS: dict[str, tuple[str, str]] = {
    # The frame.
    "new": ("New conversation", "新建对话"),
    "conversations": ("Conversations", "对话列表"),
    "settings": ("Settings", "设置"),
    "close": ("Close", "关闭"),
    "dark": ("Light or dark", "切换深浅色"),
    "language": ("Switch to Chinese", "切换到英文"),
    "model": ("Model", "模型"),
    "reload_models": ("Ask the server for its models again", "重新获取模型列表"),
    # The box to write in.
    "placeholder": ("Write a message", "输入消息"),
    "placeholder_edit": ("Change the message", "修改消息"),
    "placeholder_result": ("What {name} returned", "{name} 返回的结果"),
    "welcome": ("What can I do for you?", "有什么可以帮您？"),
    "welcome_hint": (
        "Enter sends, Shift+Enter begins a new line.",
        "按 Enter 发送，按 Shift+Enter 换行。",
    ),
    "kept_here": (
        "Conversations are kept in this browser only.",
        "对话只保存在本浏览器中。",
    ),
    # Below a message.
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "edit": ("Edit", "编辑"),
    "regenerate": ("Answer again", "重新生成"),
    "undo": ("Take back", "撤回"),
    "export": ("Export as Markdown", "导出为 Markdown"),
    "export_json": ("Export as JSON", "导出为 JSON"),
    "import": ("Import from JSON", "从 JSON 导入"),
    "rename": ("Rename", "重命名"),
    "delete": ("Delete", "删除"),
    "delete_sure": ("Delete for good?", "确定删除？"),
    "untitled": ("New conversation", "新对话"),
    # In a message.
    "you": ("You", "用户"),
    "assistant": ("Assistant", "助手"),
    "system": ("System", "系统"),
    "thinking": ("Thoughts", "思考过程"),
    "waiting": ("The model is reading", "模型正在读取"),
    "call": ("Calls", "调用工具"),
    "result": ("Result of", "工具结果"),
    "result_wanted": (
        "The model waits for what {name} returns: write it below.",
        "模型在等待 {name} 的返回值：请在下方输入。",
    ),
    "stopped": ("You stopped it here.", "您在此处停止了生成。"),
    "length": ("It ended at the longest length allowed.", "已达到最大长度限制。"),
    "filtered": ("The server held the rest back.", "其余内容已被服务器过滤。"),
    "edited": ("You corrected this.", "您修改过此回复。"),
    "clipped": (
        "{shown} of {all} characters are shown. The model gets all of it, and so do copy and "
        "export.",
        "仅显示全部 {all} 个字符中的 {shown} 个；发送给模型、复制和导出的都是全文。",
    ),
    "earlier": (
        "{count} earlier messages are not shown. They are sent, kept and exported all the same.",
        "更早的 {count} 条消息未显示；它们仍会被发送、保存和导出。",
    ),
    "tokens_in": ("{count} tokens read", "读取 {count} 个词元"),
    "tokens_cached": ("{count} of them remembered", "其中 {count} 个来自缓存"),
    "tokens_out": ("{count} written", "生成 {count} 个"),
    "pieces_out": ("{count} pieces written", "生成 {count} 段"),
    "speed": ("{speed} tokens/s", "{speed} 词元/秒"),
    "pieces_speed": ("{speed} pieces/s", "{speed} 段/秒"),
    "first": ("first after {seconds} s", "首个用时 {seconds} 秒"),
    # Settings.
    "system_prompt": ("System prompt", "系统提示词"),
    "system_hint": ("Empty: the model's own", "留空：使用模型默认值"),
    "sampling": ("Sampling", "采样参数"),
    "sampling_hint": (
        "What is empty is not sent: the model's own default holds.",
        "留空的参数不会发送：使用模型默认值。",
    ),
    "temperature": ("Temperature (0 = most likely)", "温度（0 = 最可能）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "min_p": ("Min-p", "Min-p"),
    "max_tokens": ("Longest answer (tokens)", "最大生成长度（词元）"),
    "seed": ("Seed", "随机种子"),
    "presence_penalty": ("Presence penalty", "存在惩罚"),
    "frequency_penalty": ("Frequency penalty", "频率惩罚"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "stop": ("Stop texts, one a line", "停止文本（每行一个）"),
    "tools": ("Tools (a JSON list, as the API takes them)", "工具（JSON 列表，与 API 格式相同）"),
    # What went wrong.
    "busy": (
        "The answer is still coming; stop it first.",
        "回复仍在生成，请先停止。",
    ),
    "editing": ("You are changing message {number}.", "正在修改第 {number} 条消息。"),
    "cancel": ("Cancel", "取消"),
    "no_server": ("No server answers at {url}.", "{url} 没有服务器响应。"),
    "no_models": (
        "The server names no model; write its name.",
        "服务器没有列出模型，请手动输入模型名称。",
    ),
    "no_model": ("Choose a model first.", "请先选择模型。"),
    "broken": ("The connection broke: {reason}", "连接中断：{reason}"),
    "refused": (
        "The server refused (status {status}): {reason}",
        "服务器拒绝了请求（{status}）：{reason}",
    ),
    "not_kept": (
        "This browser cannot keep the conversation ({reason}). Export it.",
        "本浏览器无法保存对话（{reason}），请导出。",
    ),
    "no_storage": (
        "This browser keeps nothing: conversations are lost when the page is closed.",
        "本浏览器不允许保存数据：关闭页面后对话将丢失。",
    ),
}

# What the page's own script says.
FOR_SCRIPT = (
    "copied", "rename", "delete", "delete_sure", "untitled", "not_kept", "no_storage",
    "new", "conversations", "settings", "close", "dark", "language", "export", "export_json",
    "import", "reload_models",
)  # fmt: skip


def word(name: str, language: str, /, **values: object) -> str:
    """The words called `name` in a language of `LANGUAGES`, with `values` in their places.

    Raises KeyError for a name that is not there.
    """
    text = WORDS[name][1 if language == "zh" else 0]
    return text.format_map(values) if values else text


def known_language(given: str | None, accepted: str = "") -> str:
    """`given` if the page speaks it, else the one that the browser asks for first, else English.

    `accepted` is an Accept-Language header.
    """
    if given in LANGUAGES:
        return str(given)
    for entry in accepted.split(","):
        tag = entry.split(";")[0].strip().lower().partition("-")[0]
        if tag in LANGUAGES:
            return tag
    return "en"


def script_words(language: str) -> dict[str, str]:
    """What the page's script needs to speak `language`."""
    words = {name: word(name, language) for name in FOR_SCRIPT}
    return {**words, "lang": language, "write": word("placeholder", language)}
