// The page's own script: what Gradio's components do not do. It never makes HTML of a text.
//
// To the program: `ask({do: …})` writes JSON into a hidden field whose change Python handles.
// From the program: the hidden `#q-signal` changes, and `told` reads the JSON in it.
"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const PHONE = window.matchMedia("(max-width: 820px)");
  let words = {};
  let current = { id: "", title: "" };
  let heads = [];
  let asked = 0;

  // ---- The browser's storage: a list of heads, and the texts beside it.

  let opening;
  const storage = () => {
    opening ??= new Promise((done, fail) => {
      const request = indexedDB.open("qwenkit-conversations", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("heads", { keyPath: "id" });
        request.result.createObjectStore("texts");
      };
      request.onsuccess = () => done(request.result);
      request.onerror = () => fail(request.error);
    });
    return opening;
  };
  const within = async (mode, work) => {
    const open = (await storage()).transaction(["heads", "texts"], mode);
    const request = work(open.objectStore("heads"), open.objectStore("texts"));
    return new Promise((done, fail) => {
      open.oncomplete = () => done(request && request.result);
      open.onabort = open.onerror = () => fail(open.error || request.error);
    });
  };
  const others = "BroadcastChannel" in window ? new BroadcastChannel("qwenkit") : null;
  const changed = async () => {
    await list();
    others?.postMessage("changed");
  };
  const keep = async (head, text) => {
    try {
      await within("readwrite", (all, texts) => {
        texts.put(text, head.id);
        all.put({ ...head, changed: Date.now() });
      });
      // Not while it is being left: what comes next has been remembered already.
      if (head.id === current.id && isSettled()) remember("last", head.id);
      await changed();
    } catch (error) {
      say(words.not_kept.replace("{reason}", error?.name || error));
    }
  };
  const remember = (name, value) => {
    try {
      localStorage.setItem(`qwenkit-${name}`, value);
    } catch {
      // A browser that keeps nothing has been reported already, when the list was read.
    }
  };
  const remembered = (name) => {
    try {
      return localStorage.getItem(`qwenkit-${name}`);
    } catch {
      return null;
    }
  };

  // ---- Talking with the program.

  const fill = (field, value) => {
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const ask = (command) => {
    asked += 1;
    fill($("#q-action textarea, #q-action input"), JSON.stringify({ ...command, number: asked }));
    return asked;
  };

  // Another conversation is on its way until the program's word of it. What is sent meanwhile would
  // go to the one before it, and its answer be put aside; so it waits, see `hold`. No word comes of
  // a conversation that is larger than a request may be: hence the patience.
  const PATIENCE_MS = 60000;
  let switched = { do: "new" }; // what has been asked for last
  let wanted = 0; // the number it was asked under
  let arrived = 0; // the highest number that has been answered
  let reading = 0; // conversations that are being read from the browser's storage
  let isBegun = false;
  const isSettled = () => isBegun && !reading && arrived >= wanted;
  const settle = () => {
    if (!isSettled()) return;
    document.body.classList.add("q-ready");
    sendHeld();
  };
  const change = (command) => {
    const number = ask(command);
    wanted = number;
    setTimeout(() => arrive(number), PATIENCE_MS);
  };
  const arrive = (number) => {
    arrived = Math.max(arrived, number);
    settle();
  };
  const field = (id) => $(`#${id} textarea, #${id} input`);
  // A field and the signal about it are drawn one after the other: wait for the field.
  const until = async (find) => {
    for (let i = 0; i < 200; i++) {
      const found = find();
      if (found) return found;
      await new Promise((done) => setTimeout(done, 25));
    }
    return null;
  };
  const whenFull = (id, length, held = "") =>
    until(() => {
      const text = field(id)?.value || "";
      return text.length === length && text.slice(0, 200).includes(held) ? text : null;
    });
  const told = async (signal) => {
    if (signal.taken && signal.taken === String(sent.number)) empty();
    if (signal.words) speak(signal.words);
    // Gradio keeps no order between two actions. What was asked for first and came last is not
    // what the page shall show: then the other is asked for again.
    if (signal.asked < arrived && signal.current?.opened) change(switched);
    if (signal.current) {
      const { id, title, length, opened, keep: isKept } = signal.current;
      if (opened) {
        pinned = true;
        current = { id, title };
        mark();
      }
      const text = opened || isKept ? await whenFull("q-current", length, `"${id}"`) : null;
      if (isKept && opened && text !== null) {
        switched = { do: "open", conversation: JSON.parse(text) };
      }
      if (signal.asked) arrive(signal.asked);
      if (isKept && text !== null) await keep({ id, title }, text);
      // So may the end of an answer be drawn after another conversation has been opened.
      if (!opened && id !== current.id) change(switched);
    } else if (signal.asked) {
      arrive(signal.asked); // it could not be opened
    }
    setTimeout(() => keepDraft({ target: field("q-message") }), 100);
    if (signal.focus) write();
    if (signal.download) await save(signal.download);
    if (signal.ready) await begin();
  };
  const begin = async () => {
    write();
    const go = () => {
      isBegun = true;
      settle();
    };
    setTimeout(go, PATIENCE_MS); // a browser's storage may never answer
    await list();
    if (isBegun) return;
    const last = remembered("last");
    if (last && heads.some((head) => head.id === last)) await open(last);
    restoreDraft();
    go();
  };
  // What is in the box goes with the conversation that is left; what is written from now on stays.
  const leave = () => {
    isHeld = false;
    fill(field("q-message"), "");
  };
  const startNew = () => {
    leave();
    remember("last", "");
    switched = { do: "new" };
    change(switched);
  };
  const open = async (id) => {
    let text;
    reading += 1;
    try {
      text = await within("readonly", (_, texts) => texts.get(id));
    } catch {
      say(words.no_storage);
    }
    reading -= 1;
    if (!text) return settle();
    remember("last", id);
    switched = { do: "open", conversation: JSON.parse(text) };
    change(switched);
  };
  const save = async ({ name, type, length }) => {
    const quoted = await whenFull("q-exported", length);
    if (quoted === null) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.parse(quoted)], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const say = (text) => {
    const note = document.createElement("div");
    note.className = "q-toast";
    note.setAttribute("role", "status");
    note.textContent = text;
    document.body.append(note);
    setTimeout(() => note.remove(), 6000);
  };

  // ---- The list of conversations.

  const button = (kind, title, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = `q-icon q-${kind}`;
    made.title = title;
    made.setAttribute("aria-label", title);
    made.addEventListener("click", (event) => {
      event.stopPropagation();
      act(made);
    });
    return made;
  };
  const list = async () => {
    try {
      heads = await within("readonly", (all) => all.getAll());
    } catch {
      say(words.no_storage);
      return;
    }
    heads.sort((a, b) => b.changed - a.changed);
    $("#q-list").replaceChildren(...heads.map(row));
    mark();
  };
  const row = (head) => {
    const made = document.createElement("div");
    made.className = "q-row";
    made.dataset.id = head.id;
    const title = document.createElement("button");
    title.type = "button";
    title.className = "q-row-title";
    title.textContent = head.title || words.untitled;
    title.title = title.textContent;
    title.addEventListener("click", async () => {
      if (PHONE.matches) document.body.classList.remove("q-nav-open");
      leave();
      await open(head.id);
    });
    const renaming = button("rename", words.rename, () => rename(head, title));
    const deleting = button("delete", words.delete, (pressed) => remove(head, pressed));
    made.append(title, renaming, deleting);
    return made;
  };
  const mark = () => {
    for (const made of document.querySelectorAll(".q-row")) {
      const isCurrent = made.dataset.id === current.id;
      made.classList.toggle("q-current-row", isCurrent);
      made.firstChild.setAttribute("aria-current", isCurrent ? "page" : "false");
    }
  };
  const rename = (head, title) => {
    const box = document.createElement("input");
    box.value = head.title;
    box.className = "q-row-title";
    box.setAttribute("aria-label", words.rename);
    let isDone = false;
    const done = async (isMeant) => {
      if (isDone) return;
      isDone = true;
      const name = box.value.trim();
      box.replaceWith(title);
      if (!isMeant || !name || name === head.title) return;
      if (head.id === current.id) return ask({ do: "rename", title: name });
      const text = JSON.parse(await within("readonly", (_, texts) => texts.get(head.id)));
      await within("readwrite", (all, texts) => {
        texts.put(JSON.stringify({ ...text, title: name }), head.id);
        all.put({ ...head, title: name });
      });
      await changed();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) done(true);
      if (event.key === "Escape") done(false);
    });
    box.addEventListener("blur", () => done(true));
    title.replaceWith(box);
    box.focus();
    box.select();
  };
  const remove = async (head, pressed) => {
    if (!pressed.classList.contains("q-sure")) {
      pressed.classList.add("q-sure");
      pressed.textContent = words.delete_sure;
      setTimeout(() => {
        pressed.classList.remove("q-sure");
        pressed.textContent = "";
      }, 3000);
      return;
    }
    await within("readwrite", (all, texts) => {
      texts.delete(head.id);
      all.delete(head.id);
    });
    await changed();
    if (head.id === current.id) startNew();
  };
  others?.addEventListener("message", list);

  // ---- Buttons: by their class, wherever they are.

  const copy = async (text, pressed) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const box = document.createElement("textarea"); // no clipboard over plain http
      box.value = text;
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    pressed.classList.add("q-done");
    const before = pressed.textContent;
    if (before) pressed.textContent = words.copied;
    setTimeout(() => {
      pressed.classList.remove("q-done");
      if (before) pressed.textContent = before;
    }, 1500);
  };
  const indexOf = (pressed) => Number(pressed.closest(".q-turn").id.slice("q-turn-".length));
  const turnOf = (pressed) => JSON.parse(field("q-current").value).turns[indexOf(pressed)];
  const wholeText = (turn) =>
    turn.text || (turn.calls || []).map((call) => `${call.name}(${call.arguments})`).join("\n");
  const toggle = (name) => {
    document.body.classList.toggle(name);
    if (!PHONE.matches) remember(name, document.body.classList.contains(name) ? "1" : "0");
  };
  const DEEDS = {
    "copy-code": (b) => copy(b.closest(".q-code").querySelector("code").textContent, b),
    copy: (b) => copy(wholeText(turnOf(b)) || "", b),
    edit: (b) => ask({ do: "edit", index: indexOf(b) }),
    cancel: () => ask({ do: "cancel" }),
    undo: () => ask({ do: "undo" }),
    regenerate: () => ask({ do: "regenerate" }),
    new: () => {
      if (PHONE.matches) document.body.classList.remove("q-nav-open");
      startNew();
      write();
    },
    export: () => ask({ do: "export", kind: "markdown" }),
    "export-json": () => ask({ do: "export", kind: "json" }),
    import: () => {
      const chooser = document.createElement("input");
      chooser.type = "file";
      chooser.accept = ".json,application/json";
      chooser.addEventListener("change", async () => {
        const text = await chooser.files[0].text();
        leave();
        change({ do: "import", text });
      });
      chooser.click();
    },
    "reload-models": () => ask({ do: "models" }),
    language: () => ask({ do: "language", language: document.documentElement.lang === "zh" ? "en" : "zh" }),
    dark: () => paint(!document.body.classList.contains("dark")),
    "toggle-nav": () => toggle("q-nav-open"),
    "toggle-side": () => toggle("q-side-open"),
    close: () => toggle("q-side-open"),
  };
  document.addEventListener("click", (event) => {
    const pressed = event.target.closest?.(".q-do");
    const deed = [...(pressed?.classList || [])].map((name) => DEEDS[name.slice(2)]).find(Boolean);
    if (deed) {
      deed(pressed);
    } else if (PHONE.matches && event.target.matches?.("#q-main, #q-main *")) {
      document.body.classList.remove("q-nav-open", "q-side-open");
    }
  });

  // ---- Language, light and dark, writing, scrolling.

  const TITLES = {
    new: "new", "toggle-nav": "conversations", "toggle-side": "settings", close: "close", dark: "dark",
    language: "language", import: "import", "reload-models": "reload_models",
    export: "export", "export-json": "export_json",
  };
  const speak = (given) => {
    words = given;
    document.documentElement.lang = given.lang;
    for (const [kind, name] of Object.entries(TITLES)) {
      for (const found of document.querySelectorAll(`.q-${kind}`)) {
        found.title = words[name];
        found.setAttribute("aria-label", words[name]);
        if (!found.classList.contains("q-icon")) found.textContent = words[name];
      }
    }
    for (const found of document.querySelectorAll(".q-language")) {
      found.textContent = given.lang === "zh" ? "EN" : "中文";
    }
    field("q-message")?.setAttribute("aria-label", words.write);
    if ($(".q-row")) list();
  };
  const paint = (isDark) => {
    document.body.classList.toggle("dark", isDark);
    remember("dark", isDark ? "1" : "0");
  };
  const write = () => {
    if (!PHONE.matches) field("q-message")?.focus(); // on a phone the keyboard would cover half
  };
  let pinned = true;
  let isSticking = false;
  const stick = () => {
    if (isSticking) return; // once a picture: measuring lays everything out
    isSticking = true;
    requestAnimationFrame(() => {
      isSticking = false;
      const scroller = $("#q-scroll");
      if (pinned && scroller) scroller.scrollTop = scroller.scrollHeight;
    });
  };
  // Enter ends the composing of a Chinese word; it must not send what is half written.
  const composing = (event) => {
    if (event.key === "Enter" && (event.isComposing || event.keyCode === 229)) {
      event.stopPropagation();
    }
  };
  for (const kind of ["keydown", "keypress"]) document.addEventListener(kind, composing, true);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (field("q-editing")?.value) ask({ do: "cancel" });
    document.body.classList.remove("q-side-open");
  });

  // What is being written outlives a reload, such as Gradio's own after a lost connection.
  const DRAFT = "qwenkit-draft";
  const keepDraft = (event) => {
    if (event.target !== field("q-message")) return;
    try {
      sessionStorage.setItem(DRAFT, event.target.value);
    } catch {
      // Too long to keep, or nothing may be kept.
    }
  };
  document.addEventListener("input", keepDraft);
  const restoreDraft = () => {
    let draft;
    try {
      draft = sessionStorage.getItem(DRAFT);
    } catch {
      return;
    }
    if (draft && !field("q-message").value) fill(field("q-message"), draft);
  };

  // What was sent leaves the box, unless something else has been written meanwhile. The program
  // empties it too, but Gradio may pass over that when an answer comes at once.
  let sent = { number: 0, text: "" };
  const sending = () => {
    sent = { number: sent.number + 1, text: field("q-message").value };
    fill(field("q-sent"), String(sent.number));
  };
  const empty = () => {
    if (sent.text && field("q-message").value === sent.text) fill(field("q-message"), "");
    sent.text = "";
  };
  // Nothing is sent while another conversation is on its way: it is sent into that one.
  let isHeld = false;
  const hold = (event) => {
    event.preventDefault();
    event.stopPropagation();
    isHeld = field("q-message").value !== ""; // an empty one would answer a call
  };
  const sendHeld = async () => {
    if (!isHeld) return;
    const pressed = await until(() => $("#q-message .submit-button"));
    if (!isHeld || !isSettled()) return; // meanwhile sent, or another one is on its way
    isHeld = false;
    if (!pressed) return; // an answer is coming: the text stays in the box
    sending();
    pressed.click();
  };
  document.addEventListener(
    "keydown",
    (event) => {
      const isMeant = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (!isMeant || event.target !== field("q-message")) return;
      if (isSettled()) sending();
      else hold(event);
    },
    true,
  );
  for (const kind of ["pointerdown", "click"]) {
    document.addEventListener(
      kind,
      (event) => {
        if (!event.target.closest?.("#q-message .submit-button")) return;
        if (kind === "pointerdown") sending();
        else if (!isSettled()) hold(event);
      },
      true,
    );
  }

  // ---- Start: Gradio draws the page a while after this script runs.

  const start = () => {
    const dark = remembered("dark");
    if (dark !== null) document.body.classList.toggle("dark", dark === "1");
    if (!PHONE.matches) {
      document.body.classList.toggle("q-nav-open", remembered("q-nav-open") !== "0");
      document.body.classList.toggle("q-side-open", remembered("q-side-open") === "1");
    }
    const scroller = $("#q-scroll");
    scroller.addEventListener("scroll", () => {
      pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    });
    new MutationObserver(stick).observe(scroller, { childList: true, subtree: true, characterData: true });
    let last = "";
    const read = () => {
      const text = $("#q-signal")?.textContent.trim() || "";
      if (!text || text === last) return;
      let signal;
      try {
        signal = JSON.parse(text);
      } catch {
        return; // half drawn: the next change brings the rest
      }
      last = text;
      told(signal);
    };
    new MutationObserver(read).observe($("#q-signal"), { childList: true, subtree: true, characterData: true });
    read();
  };
  const waiting = new MutationObserver(() => {
    if (!$("#q-signal") || !$("#q-scroll") || !$("#q-list") || !field("q-action")) return;
    waiting.disconnect();
    start();
  });
  waiting.observe(document.documentElement, { childList: true, subtree: true });
})();
