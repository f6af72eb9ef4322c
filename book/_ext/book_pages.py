"""Sphinx extension of this book: films, figures of notebooks, readable signatures, no buttons without an address."""

from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec, stringify_annotation

PLAYER = """<figure class="film"><video controls preload="none" playsinline poster="{poster}" aria-label="{alt}">
<source src="{film}" type="video/mp4"><a href="{film}">{alt}</a></video><figcaption>"""


class Film(SphinxDirective):
    """Shows a film that plays on request only; its text is the caption.

    The argument and `:poster:` are files, relative to the page or, with a leading slash, to the project. Sphinx
    copies both beside the built pages. `:alt:` says in words what the film shows.
    """

    required_arguments = 1
    has_content = True
    option_spec: OptionSpec = {"poster": directives.path, "alt": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """The player as raw HTML around the parsed caption; an error if a file or an option is missing."""
        if missing := {"poster", "alt"} - self.options.keys():
            raise self.error(f"film: the option :{min(missing)}: is missing; add it")
        links = {"film": self._link(self.arguments[0]), "poster": self._link(self.options["poster"])}
        alt = self.options["alt"].replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        caption = nodes.paragraph()
        self.state.nested_parse(self.content, self.content_offset, caption)
        inline = caption.children[0].children if caption.children else []
        start = nodes.raw("", PLAYER.format(alt=alt, **links), format="html")
        return [start, nodes.inline("", "", *inline), nodes.raw("", "</figcaption></figure>", format="html")]

    def _link(self, path: str) -> str:
        relative, absolute = self.env.relfn2path(path)
        try:
            with open(absolute, "rb"):
                self.env.note_dependency(relative)
        except OSError:
            raise self.error(f"film: there is no file {relative}; correct the path") from None
        target = self.env.dlfiles.add_file(self.env.docname, relative)
        return "../" * self.env.docname.count("/") + f"_downloads/{target}"


class NotebookFigure(SphinxDirective):
    """Shows a notebook's figure on another page, as the notebook drew it; its text is the caption there.

    The argument is the name that the notebook's cell gives the figure, `:name:` the one it has on this page.
    """

    required_arguments = 1
    has_content = True
    option_spec: OptionSpec = {"name": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """An empty figure, filled by `FillFigures` when all notebooks have been executed."""
        figure, text = nodes.figure(notebook_figure=self.arguments[0]), nodes.paragraph()
        self.state.nested_parse(self.content, self.content_offset, text)
        if "name" not in self.options or not text.children:
            raise self.error(f"notebook-figure {self.arguments[0]}: give it a :name: and a caption")
        figure += nodes.caption("", "", *text.children[0].children)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


class FillFigures(SphinxPostTransform):
    """Copies pictures, with their alternative text, from notebooks' pages into `notebook-figure`s."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        """Warn of a figure that no notebook draws."""
        for figure in self.document.findall(nodes.figure):
            if not (name := figure.get("notebook_figure")):
                continue
            page, anchor = self.env.get_domain("std").anonlabels.get(name, ("", ""))  # type: ignore[attr-defined]
            drawn = self.env.get_doctree(page).findall(nodes.figure) if page else ()
            pictures = [image for own in drawn if anchor in own["ids"] for image in own.findall(nodes.image)]
            if pictures:
                figure.insert(0, pictures[0].deepcopy())
            else:
                logging.getLogger(__name__).warning(f"no notebook draws a figure {name}", location=figure)


def follow_addresses(app: Sphinx, config: Config) -> None:
    """Derive what hangs on `repository.url` and `html.baseurl`; leave out what has no address."""
    options: dict[str, Any] = config.html_theme_options
    if not options.get("repository_url"):
        for name in ("launch_buttons", "use_repository_button", "use_edit_page_button", "use_issues_button"):
            options.pop(name, None)
    config.ogp_site_url = config.html_baseurl
    config.notfound_urls_prefix = urlsplit(config.html_baseurl).path or "/"


def plain_model_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, None] | None:
    """Show a pydantic model's fields with their types, without the constraints, which would drown them."""
    if what != "class" or not hasattr(obj, "model_fields"):
        return None
    parameters = []
    for key, field in obj.model_fields.items():
        default = "" if field.is_required() else f" = {field.default!r}"
        parameters.append(f"{key}: {stringify_annotation(field.annotation, 'smart')}{default}")
    return f"(*, {', '.join(parameters)})", None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and the hooks."""
    app.add_directive("film", Film)
    app.add_directive("notebook-figure", NotebookFigure)
    app.add_post_transform(FillFigures)
    app.connect("config-inited", follow_addresses, priority=100)
    app.connect("autodoc-process-signature", plain_model_signature)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
