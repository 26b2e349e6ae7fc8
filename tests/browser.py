"""Pages as a browser shows them, without a screen: what stands where, and a picture of each.

    python tests/browser.py FOLDER WIDTH[,WIDTH…] PAGE…

prints what each page has at each width as a line of JSON, and writes the pictures to the folder. The browser is QtWebEngine,
which is Chromium: ``pip install PySide6-WebEngine``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TALL = 7000  # pixels of a page that are seen
PARTS = """
(() => {
  const box = e => (({left, right, width, height}) => ({left, right, width, height}))(e.getBoundingClientRect());
  const scrolls = e => { for (; e && e !== document.body; e = e.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const all = query => [...document.querySelectorAll(query)].filter(e => e.checkVisibility());
  const width = document.documentElement.clientWidth;
  return JSON.stringify({
    width,
    height: Math.ceil(document.body.getBoundingClientRect().bottom),
    sections: all("section[id]").map(e => e.id),
    pictures: all("section svg, img")
      .map(e => ({...box(e), loaded: e.naturalWidth !== 0, of: e.closest("section")?.id ?? e.alt})),
    rows: all("tr").length,
    cut: all("svg, img, table, pre, p, h1, h2, h3, li").filter(e => !scrolls(e) && box(e).right > width + 1)
      .map(e => e.tagName + " " + e.textContent.trim().slice(0, 40)),
  });
})()
"""


def look(folder, pages, widths=(1280, 420)):
    """[{page, width, picture, …}] of each page at each width, with what ``PARTS`` finds; skips the test without a browser."""
    pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError, reason="pip install PySide6-WebEngine")
    command = [sys.executable, __file__, str(folder), ",".join(map(str, widths)), *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 20 * len(widths) * len(pages))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(folder, widths, *pages):
    flags = "--no-sandbox --disable-gpu"
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags, "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app, view = QApplication([]), QWebEngineView()
    left = [(page, int(width)) for page in pages for width in widths.split(",")]

    def begin():
        if not left:
            return app.quit()
        view.resize(left[0][1], TALL)
        view.load(QUrl.fromLocalFile(str(Path(left[0][0]).resolve())))

    def loaded(whole):
        if not whole:
            print(f"{left[0][0]} does not load", file=sys.stderr)
            return app.exit(1)
        QTimer.singleShot(400, lambda: view.page().runJavaScript(PARTS, found))

    def found(text):
        QTimer.singleShot(400, lambda: finish(json.loads(text), view.grab().toImage()))

    def finish(parts, before):
        width = left[0][1]
        now = view.grab().toImage()
        if now != before or len({now.pixel(width // 2, y) for y in range(400)}) == 1:  # still painting
            return QTimer.singleShot(500, lambda: finish(parts, now))
        page, _ = left.pop(0)
        picture = Path(folder) / f"{Path(page).parent.name}-{Path(page).stem}-{width}.png"
        now.copy(0, 0, parts["width"], min(parts["height"], TALL)).save(str(picture))
        print(json.dumps({"page": page, "picture": str(picture), **parts}), flush=True)
        begin()

    view.loadFinished.connect(loaded)
    view.show()
    begin()
    return app.exec()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
