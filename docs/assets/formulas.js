// Formulas of notebooks, set by the MathJax beside this file; it asks for nothing from elsewhere, its menu included.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: "md-container", processHtmlClass: "jp-RenderedMarkdown|jp-RenderedLatex", enableMenu: false },
};
