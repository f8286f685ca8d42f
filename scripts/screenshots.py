#!/usr/bin/env python3
"""Takes pictures of every page of the web interface, to be looked at: light and dark, on a desk and on a phone, in each
language.

    scripts/screenshots.py https://127.0.0.1:8460 TOKEN-FILE DIRECTORY [--pages /,/vms] [--looks light,dark,phone,zh]

Needs chromedriver and Chromium. Takes the daemon's own certificate. Pages of one VM, host, job, policy and repository are
those that the API lists first. Says what scripts complained of, and which texts stick out of the page sideways.
"""

import argparse
import base64
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

LOOKS = {
    "light": {"width": 1280, "theme": "light", "language": "en"},
    "dark": {"width": 1280, "theme": "dark", "language": "en"},
    "phone": {"width": 390, "theme": "light", "language": "en"},
    "phone-dark": {"width": 390, "theme": "dark", "language": "en"},
    "narrow": {"width": 320, "theme": "light", "language": "zh-TW"},
    "zh": {"width": 1280, "theme": "light", "language": "zh-TW"},
    "wide": {"width": 1680, "theme": "light", "language": "en"},
}
HEIGHT, HEIGHT_MAX = 800, 2600
# Whatever reaches beyond the right edge of the page.
STICKS_OUT = """const edge = document.documentElement.clientWidth + 1;
return document.documentElement.scrollWidth <= edge ? [] : [...document.querySelectorAll('main *')]
  .filter((one) => one.getBoundingClientRect().right > edge && !one.closest('.table-box, .chart-box, pre, .log, .editor'))
  .slice(0, 5).map((one) => one.tagName + '.' + one.className + ': ' + one.textContent.slice(0, 60))"""


class Browser:
    def __init__(self, base):
        self.base = base
        self.profile = tempfile.TemporaryDirectory(prefix="virtward-browser-")
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                self.port = int(found[1])
                break
        # It goes on to write, and must not meet a full pipe.
        threading.Thread(target=self.driver.stdout.read, daemon=True).start()
        arguments = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
                     f"--user-data-dir={self.profile.name}"]  # fmt: skip
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")
        wanted = {"acceptInsecureCerts": True, "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.command("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def command(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def ask(self, method, path, body=None):
        return self.command(method, self.session + path, body)

    def run(self, script, *arguments):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def cdp(self, name, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": params})

    def until(self, expression, seconds=40):
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}: {self.run('return document.body.innerText')[:600]}")
            time.sleep(0.1)

    def open(self, path):
        self.ask("POST", "/url", {"url": self.base + path})

    def size(self, width, height):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def picture(self, file):
        with open(file, "wb") as out:
            out.write(base64.b64decode(self.ask("GET", "/screenshot")))

    def end(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.profile.cleanup()


def get(base, token, path):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(base + path, headers={"authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        return json.load(answer)


def pages(base, token):
    """Every page that there is something to show on, with a name for its picture."""
    first = lambda path, field: next((str(one[field]) for one in (lambda page: page.get("items", page) if isinstance(page, dict) else page)(get(base, token, path))), None)
    quote = lambda text: urllib.parse.quote(text, safe="")
    found = {"overview": "/", "vms": "/vms", "hosts": "/hosts", "cluster": "/cluster", "ha": "/ha", "balance": "/balance", "jobs": "/jobs",
             "policies": "/policies", "policy-new": "/policies/+new", "repositories": "/repositories", "events": "/events",
             "audit": "/audit", "settings": "/settings", "api": "/api"}  # fmt: skip
    if vm := first("/api/v1/vms?limit=1&sort=-last-point", "name"):
        found["vm"] = f"/vms/{quote(vm)}"
        found["restore"] = f"/vms/{quote(vm)}/restore"
    for name, path, field in (("host", "hosts", "name"), ("policy", "policies", "name"), ("repository", "repositories", "name")):
        if one := first(f"/api/v1/{path}", field):
            found[name] = f"/{path}/{quote(one)}"
    for name, state in (("job", "succeeded"), ("job-running", "running"), ("job-failed", "failed,interrupted")):
        if one := first(f"/api/v1/jobs?limit=1&state={state}", "id"):
            found[name] = f"/jobs/{one}"
    for kind in ("migrate", "drain", "balance", "restore", "verify"):
        if one := first(f"/api/v1/jobs?limit=1&kind={kind}", "id"):
            found[f"job-{kind}"] = f"/jobs/{one}"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("token", help="a file that holds the token")
    parser.add_argument("directory")
    parser.add_argument("--pages", default="", help="names, with commas; default: all")
    parser.add_argument("--looks", default="light,dark,phone,zh", help=f"of {', '.join(LOOKS)}")
    options = parser.parse_args()
    with open(options.token, encoding="utf-8") as file:
        token = file.read().strip()
    os.makedirs(options.directory, exist_ok=True)
    wanted = [name for name in options.pages.split(",") if name]
    browser, worries = Browser(options.base), 0
    try:
        browser.size(1280, HEIGHT)
        browser.open("/")
        browser.until("document.querySelector('#token')")
        browser.run("const it = document.querySelector('#token'); it.value = arguments[0]; it.dispatchEvent(new Event('input', {bubbles: true}))", token)
        browser.run("document.querySelector('button[type=submit]').click()")
        browser.until("document.querySelector('nav [aria-current=page]')")
        for look in options.looks.split(","):
            how = LOOKS[look]
            browser.run("localStorage.setItem('virtward-theme', arguments[0]); localStorage.setItem('virtward-language', arguments[1])", how["theme"], how["language"])
            for name, path in pages(options.base, token).items():
                if wanted and name not in wanted:
                    continue
                browser.size(how["width"], HEIGHT)
                browser.open(path)
                browser.until("document.querySelector('main h1, header > h1') && !document.querySelector('[aria-busy]')")
                height = min(HEIGHT_MAX, max(HEIGHT, browser.run("return document.documentElement.scrollHeight")))
                browser.size(how["width"], height)
                time.sleep(0.5)
                browser.picture(os.path.join(options.directory, f"{name}.{look}.png"))
                for text in browser.run(STICKS_OUT):
                    print(f"{name}.{look}: sticks out: {text}")
                    worries += 1
                complaints = browser.ask("POST", "/se/log", {"type": "browser"})
                for one in complaints:
                    if one["level"] == "SEVERE" and "401" not in one["message"]:
                        print(f"{name}.{look}: {one['message']}")
                        worries += 1
    finally:
        browser.end()
    return 1 if worries else 0


if __name__ == "__main__":
    sys.exit(main())
