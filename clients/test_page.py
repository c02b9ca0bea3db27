"""The web page in a real browser: a chat with `apr serve` on the tiny model, and with a mock for what that model cannot be made
to write. Needs Chromium, by default /usr/bin/chromium (Debian's package `chromium`); `CHROMIUM` names another.
"""

import os
import re
import tempfile
import time
import unittest
import urllib.error
import urllib.request

from mock_chat import Answer, Mock
from playwright.sync_api import expect, sync_playwright
from server import Server

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]

ATTACK = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2"> [a](javascript:window.hit=3)
[b](data:text/html,<script>window.hit=4</script>) ![c](x" onerror="window.hit=5) <svg onload=window.hit=6>

`<b>` <a href="javascript:window.hit=7">d</a> [ok](https://example.com/a_b?c=%22%3E) <https://example.com/"onclick=x>

|<i>|</td><script>window.hit=8</script>|
|---|---|

```<script>window.hit=9</script>
</code></pre><iframe src="javascript:parent.hit=10"></iframe>
```
"""

MARKDOWN = """# One *two*

A **bold** word, `code`, ~~gone~~, 2 * 3 * 4 and snake_case_word.

1. first
2. second
   - inner

| a | b |
|:--|--:|
| 1 | **2** |

```rust
fn main() { println!("*no*"); }
```

> quoted
"""

ANSWERS = {
    "attack": Answer(ATTACK),
    "markdown": Answer(MARKDOWN),
    "slow": Answer("word " * 2000, delay=0.02),
    "think": Answer("It is **42**.", reasoning="Let me see."),
    "weather": Answer("Looking.", calls=[("get_weather", '{"city": "Paris"}'), ("get_time", "{}")]),
    "dense": Answer("No experts here.", experts=False),
    "fails": Answer(status=500, error="the engine is on <b>fire</b>"),
    "breaks": Answer("Half an", breaks=True),
    "many": Answer("One two three four five six seven eight nine ten."),
}


class PageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        def begin(context):
            return cls.enterClassContext(context)

        cls.apr = begin(Server("--parallel", "1", "--queue", "0", n_ctx=4096))
        cls.mock = Mock(cls.apr.url, ANSWERS)
        cls.addClassCleanup(cls.mock.close)
        cls.browser = begin(sync_playwright()).chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        cls.addClassCleanup(cls.browser.close)

    def open(self, url=None, width=1280, height=800, scheme="light", **options):
        """The page, in a browser that has never seen it."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        self.addCleanup(context.close)
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.wrong, self.asked = [], []
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(m.text))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(url or self.mock.url)
        return self.page

    def tearDown(self):
        """Nothing went wrong in the page, and it asked nobody but its server."""
        about_status = re.compile("Failed to load resource: the server responded with a status of")
        self.assertEqual([w for w in self.wrong if not about_status.search(w)], [])
        site = self.page.url.split("/")[2]
        self.assertEqual([u for u in self.asked if u.split("/")[2] != site and not u.startswith("data:")], [])

    def say(self, text):
        self.page.locator("#input").fill(text)
        self.page.keyboard.press("Enter")

    def ended(self, n=1):
        """Waits for the n-th answer to end."""
        expect(self.page.locator(".assistant .actions")).to_have_count(n, timeout=20_000)
        expect(self.page.locator("#messages")).to_have_attribute("aria-busy", "false")
        return self.page.locator(".assistant").last

    # ---- with the real server

    def test_an_answer_of_a_real_model_streams_and_is_looked_into(self):
        page = self.open(self.apr.url)
        expect(page.locator("#model")).to_have_text(self.apr.model)
        page.keyboard.press("Tab")
        page.locator("#look").click()
        page.locator("#open-settings").click()
        page.locator("#set-max_tokens").fill("40")
        page.locator("#set-temperature").fill("1")
        page.locator("#set-seed").fill("7")
        page.keyboard.press("Escape")
        self.say("Hello there")
        answer = self.ended()
        expect(answer.locator(".stats")).to_contain_text("40 tokens")
        expect(page.locator("#token-place")).to_have_text("40 of 40")
        expect(page.locator("#others li")).not_to_have_count(0)
        expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"4 layers × 8 experts"))
        self.assertGreater(self.map_colors(), 3)
        expect(page.locator("#context-text")).to_have_text(re.compile(r"^\d+ of 4,096 tokens$"))
        # The same seed gives the same text, and what was made before is there after a reload.
        text = answer.locator(".body").inner_text()
        page.keyboard.press("Escape")
        page.locator("#log").focus()
        page.keyboard.press("r")
        self.assertEqual(self.ended().locator(".body").inner_text(), text)
        page.reload()
        page.locator("#chats .open").first.click()
        self.assertEqual(page.locator(".assistant .body").inner_text(), text)
        expect(page.locator("#token-note")).to_contain_text("without looking")

    def map_colors(self):
        """Different colours on the map."""
        count = """() => { const c = document.getElementById("map"); if (!c.width) return 0;
          const d = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
          return new Set(d).size; }"""
        return self.page.evaluate(count)

    def test_to_stop_frees_the_place(self):
        page = self.open(self.apr.url)
        page.locator("#open-settings").click()
        page.locator("#extra").fill('{"ignore_eos": true}')
        page.keyboard.press("Escape")
        self.say("Hello there")
        expect(page.locator(".assistant > .end > .stats")).to_contain_text("tokens")
        self.assertEqual(self.refusal(), 429, "the one place is taken")
        page.keyboard.press("Escape")
        expect(self.ended().locator(".stats")).to_contain_text("stopped")
        self.soon(lambda: self.refusal() is None, "the server has let go of the answer")

    def soon(self, holds, what):
        deadline = time.monotonic() + 5
        while not holds():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.02)

    def refusal(self):
        """The status of a short request that is refused."""
        body = b'{"prompt": "a", "max_tokens": 1}'
        try:
            urllib.request.urlopen(self.apr.url + "/v1/completions", body).read()
        except urllib.error.HTTPError as e:
            return e.code
        return None

    def test_a_key_is_asked_for_and_kept_in_the_tab(self):
        with tempfile.NamedTemporaryFile("w") as keys:
            keys.write("open-sesame\n")
            keys.flush()
            with Server("--api-key-file", keys.name) as server:
                page = self.open(server.url)
                for key in ("wrong", "open-sesame"):
                    expect(page.locator("#ask-key")).to_be_visible()
                    page.locator("#api-key").fill(key)
                    page.keyboard.press("Enter")
                expect(page.locator("#model")).to_have_text(server.model)
                page.locator("#open-settings").click()
                page.locator("#set-max_tokens").fill("3")
                page.keyboard.press("Escape")
                self.say("hi")
                self.ended()
                page.reload()
                expect(page.locator("#model")).to_have_text(server.model)
                self.assertNotIn("open-sesame", page.evaluate("JSON.stringify(localStorage)"))

    # ---- with texts of our own

    def test_markdown_is_drawn_and_its_tokens_are_found(self):
        page = self.open()
        page.locator("#look").click()
        self.say("markdown")
        body = self.ended().locator(".body")
        for selector, text in [("h1", "One two"), ("h1 em", "two"), ("strong >> nth=0", "bold"), ("p code", "code"), ("del", "gone"),
                               ("ol > li >> nth=0", "first"), ("ol ul li", "inner"), ("th.right", "b"), ("td.right strong", "2"),
                               ("blockquote", "quoted"), (".codehead span", "rust"), ("pre", 'fn main() { println!("*no*"); }')]:
            self.assertEqual(body.locator(selector).text_content(), text, selector)
        expect(body.locator("p").first).to_have_text("A bold word, code, gone, 2 * 3 * 4 and snake_case_word.")
        body.locator("td.right strong .tok").click()
        expect(page.locator("#token-head .tok")).to_have_text("2")
        expect(page.locator("#others .chosen")).to_contain_text("2")
        expect(page.locator("#others li")).to_have_count(10)
        page.keyboard.press("ArrowRight")
        expect(page.locator("#token-head .tok")).to_have_text("*")
        page.locator("#as-tokens").check()
        expect(page.locator(".rawtokens .pinned")).to_have_text("*")
        self.assertEqual(len(page.locator(".rawtokens .tok").all()), int(page.locator("#token-place").inner_text().split()[-1]))

    def test_text_does_not_jump_while_it_comes(self):
        """Every prefix of the text is drawn: marks that are closed later are never shown, and blocks keep their kind."""
        page = self.open()
        script = """async (text) => { const { blocks } = await import("/page/markdown.js"); const seen = [];
          for (let n = 1; n <= text.length; n += 1) { const s = text.slice(0, n);
            const root = document.createElement("div");
            for (const b of blocks(s, true)) root.append(b.build((p, a, z) => p.append(s.slice(a, z))));
            seen.push([root.textContent, [...root.children].map((c) => c.className || c.tagName).join()]); }
          return seen; }"""
        seen = page.evaluate(script, MARKDOWN)
        for text, _ in seen:
            shown = text.replace('"*no*"', "").replace('"*no', "").replace('"*', "").replace("2 * 3 * 4", "").replace("2 * 3 *", "").replace("2 *", "")
            self.assertNotRegex(shown, r"\*\*|`|~~|\||#", text)
        kinds = [kinds for _, kinds in seen]
        for before, after in zip(kinds, kinds[1:]):
            self.assertTrue(after.startswith(before), f"{before} became {after}")

    def test_hostile_text_is_text(self):
        page = self.open()
        page.locator("#look").click()
        page.locator("#open-settings").click()
        page.locator("#system").fill(ATTACK)
        page.keyboard.press("Escape")
        for n, looking in enumerate([True, False], 1):
            self.say(f"attack {ATTACK}")
            answer = self.ended(n)
            self.assertIn("<script>window.hit = 1</script>", answer.locator(".body").text_content())
            hrefs = answer.locator("a").evaluate_all("links => links.map((a) => [a.href, a.rel, a.target])")
            self.assertTrue(hrefs and all(h.startswith("https://example.com/") for h, _, _ in hrefs), hrefs)
            self.assertTrue(all("noopener" in rel and target == "_blank" for _, rel, target in hrefs))
            if looking:
                answer.locator(".tok").nth(3).click()
                page.locator("#look").click()
        self.say("it fails")
        expect(page.locator(".error")).to_contain_text("on <b>fire</b>")
        page.reload()
        page.locator("#chats .open").first.click()
        expect(page.locator(".assistant")).to_have_count(3)
        made = page.evaluate("""() => [window.hit ?? null, document.querySelectorAll(
          "#messages :is(script, img, iframe, i, b, [onerror], [onload], [onclick]), #chats :is(script, img)").length]""")
        self.assertEqual(made, [None, 0])
        self.assertEqual(self.mock.requests[-1]["messages"][0], {"role": "system", "content": ATTACK})

    def test_the_map_and_the_alternatives_of_a_large_model(self):
        page = self.open()
        page.locator("#look").click()
        self.say("many")
        answer = self.ended()
        request = self.mock.requests[-1]
        self.assertEqual([request[k] for k in ("logprobs", "top_logprobs", "apr_experts")], [True, 10, True])
        expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("48 layers × 128 experts"))
        colors = {}
        for mode in ("Live", "Totals", "Token"):
            page.get_by_role("button", name=mode, exact=True).click()
            page.wait_for_timeout(100)
            colors[mode] = self.map_colors()
        self.assertTrue(all(n > 3 for n in colors.values()), colors)
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#map-read")).to_contain_text("Layer 0, expert 1:")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#map-read")).to_contain_text("expert 0: 11 of 11 tokens")
        expect(answer.locator(".tok.marked")).to_have_count(11)
        # Another token is taken, and the answer goes on from there.
        answer.locator(".tok", has_text="three").click()
        page.locator("#others button").first.click()
        expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")
        sent = self.mock.requests[-1]["messages"][-1]
        self.assertEqual(sent["role"], "assistant")
        self.assertTrue(sent["content"].startswith("One two") and "three" not in sent["content"], sent)
        expect(page.locator(".tok.taken")).to_have_count(1)
        page.keyboard.press("n")
        self.say("dense")
        self.ended()
        expect(page.locator("#map-none")).to_contain_text("without experts")
        expect(page.locator("#map-box")).to_be_hidden()

    def test_reasoning_is_folded_and_calls_are_shown(self):
        page = self.open()
        page.locator("#look").click()
        self.say("think")
        answer = self.ended()
        expect(answer.locator("summary")).to_have_text("Thoughts")
        expect(answer.locator(".thought")).to_be_hidden()
        answer.locator("summary").click()
        expect(answer.locator(".thought")).to_have_text("Let me see.")
        expect(answer.locator("strong .tok")).to_have_text("42")
        self.say("weather")
        answer = self.ended(2)
        expect(answer.locator(".callhead")).to_have_text(["get_weather", "get_time"])
        expect(answer.locator(".call pre").first).to_have_text('{\n  "city": "Paris"\n}')
        answer.get_by_label("Result of get_weather").fill("many clouds")
        answer.get_by_role("button", name="Send results").click()
        self.ended(3)
        sent = self.mock.requests[-1]["messages"]
        self.assertEqual([m["role"] for m in sent[-3:]], ["assistant", "tool", "tool"])
        self.assertEqual((sent[-2]["content"], sent[-2]["tool_call_id"]), ("many clouds", "call_0"))

    def test_errors_are_told_and_may_be_tried_again(self):
        page = self.open()
        self.say("this breaks")
        expect(self.ended().locator(".body")).to_have_text("Half an")
        expect(page.locator(".error")).to_contain_text("ended before the answer did")
        self.say("this fails")
        answer = self.ended(2)
        expect(answer.locator(".error")).to_contain_text("the engine is on")
        n = len(self.mock.requests)
        answer.get_by_role("button", name="Try again").click()
        self.ended(2)
        self.assertEqual(len(self.mock.requests), n + 1)

    def test_no_text_takes_long_to_read(self):
        page = self.open()
        for text in ["```" + " " * 80_000 + "`x", "~" * 80_000 + "`", "a\n" + " " * 80_000 + "x", "- " * 20_000, "|`" * 20_000,
                     "a|b\n" + "-|" * 20_000, "*_" * 20_000, "[" * 20_000 + "](", "<http://" * 5_000]:
            took = page.evaluate("""async (text) => {
                const { blocks } = await import("/page/markdown.js");
                const start = performance.now();
                const put = (parent, a, b) => parent.append(text.slice(a, b));
                blocks(text, true).forEach((block) => block.build(put));
                return performance.now() - start;
            }""", text)
            self.assertLess(took, 2000, text[:20])

    def test_a_conversation_that_is_deleted_while_it_is_answered_stays_so(self):
        page = self.open()
        self.say("slow")
        expect(page.locator(".assistant .body")).to_contain_text("word word")
        remove = page.locator("#chats li button:not(.open)")
        remove.click()
        remove.click()
        expect(page.locator("#messages article")).to_have_count(0)
        # The answer has been stopped by now, and everything that is kept of it was.
        page.wait_for_timeout(500)
        expect(page.locator("#chats li")).to_have_count(0)
        page.reload()
        expect(page.locator("#chats li")).to_have_count(0)

    def test_conversations_are_kept_edited_and_deleted(self):
        page = self.open()
        self.say("first question")
        self.ended()
        expect(page.locator(".assistant .body")).to_have_text("You said: first question")
        page.locator("#input").press("ArrowUp")
        page.locator(".editing").fill("another question")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant .body")).to_have_text("You said: another question")
        page.locator("#new").click()
        self.say("second talk")
        self.ended()
        expect(page.locator("#chats .open")).to_have_text(["second talk", "another question"])
        page.reload()
        expect(page.locator("#empty")).to_be_visible()
        page.locator("#chats .open").nth(1).click()
        expect(page.locator(".user .body")).to_have_text("another question")
        page.locator("#chats li").nth(1).hover()
        page.locator("#chats .icon").nth(1).click()
        page.locator("#chats .sure").click()
        expect(page.locator("#chats .open")).to_have_text(["second talk"])
        expect(page.locator("#empty")).to_be_visible()

    def test_keys(self):
        page = self.open()
        expect(page.locator("#input")).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("slow")
        page.keyboard.press("Enter")
        expect(page.locator(".user .body")).to_have_text("one\nslow")
        expect(page.locator(".assistant .body")).to_contain_text("word word word")
        page.keyboard.press("Escape")
        self.ended()
        self.soon(lambda: self.mock.n_open == 0, "the connection is closed")
        page.locator("#log").focus()
        for key, selector in [("?", "#keys"), (",", "#settings")]:
            page.keyboard.press(key)
            expect(page.locator(selector)).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.locator(selector)).to_be_hidden()
            page.locator("#log").focus()
        page.keyboard.press("i")
        expect(page.locator("#inside")).to_be_visible()
        page.keyboard.press("i")
        expect(page.locator("#inside")).to_be_hidden()
        page.keyboard.press("/")
        expect(page.locator("#input")).to_be_focused()

    def test_light_and_dark(self):
        dark = "getComputedStyle(document.body).backgroundColor"
        page = self.open(scheme="dark")
        black = page.evaluate(dark)
        page.emulate_media(color_scheme="light")
        white = page.evaluate(dark)
        self.assertNotEqual(black, white)
        page.locator("#theme").click()
        page.locator("#theme").click()
        self.assertEqual(page.evaluate(dark), black)
        page.reload()
        self.assertEqual(page.evaluate(dark), black)

    def test_narrow(self):
        page = self.open(width=375, height=700, scheme="dark", has_touch=True)
        page.locator("#look").click()
        self.say("markdown with_a_word_that_is_longer_than_any_screen_of_a_telephone_could_ever_show_in_one_line")
        self.ended()
        widths = "[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
        self.assertEqual(page.evaluate(widths), [375, 375])
        page.locator("#side-open").click()
        expect(page.locator("#new")).to_be_in_viewport()
        page.locator("#chats .open").click()
        expect(page.locator("#new")).not_to_be_in_viewport()
        page.locator("#open-settings").click()
        self.assertEqual(page.evaluate(widths), [375, 375])

    def test_everything_that_can_be_used_has_a_name(self):
        page = self.open()
        page.locator("#look").click()
        self.say("markdown")
        self.ended()
        nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, canvas, dialog, aside, nav")]
          .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.labels?.length
            || e.textContent.trim())).map((e) => e.outerHTML.slice(0, 80))""")
        self.assertEqual(nameless, [])
        expect(page.locator("#said")).to_contain_text("Answer: # One")


if __name__ == "__main__":
    unittest.main()
