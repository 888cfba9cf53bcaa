"""Sphinx extension that takes sphinx-thebe's scripts off the pages.

jupyter-book always loads that extension. Here nothing uses it: its script declares one constant twice, which
every browser logs as an error, and it names a CDN.
"""


def drop_scripts(app, pagename, templatename, context, doctree):
    """Keep the page's other scripts."""
    files = context.get("script_files", [])
    context["script_files"] = [file for file in files if "thebe" not in str(file).lower()]


def setup(app):
    """Run after sphinx-thebe has added its scripts."""
    app.connect("html-page-context", drop_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
