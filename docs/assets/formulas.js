// Loaded by the pages of notebooks: sets their formulas with the MathJax that lies beside this file, and asks for
// nothing from elsewhere, its menu (which would) included.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]], processEscapes: true },
  options: {
    ignoreHtmlClass: "md-container",
    processHtmlClass: "jp-RenderedMarkdown|jp-RenderedLatex",
    enableMenu: false,
  },
};
const mathjax = document.createElement("script");
mathjax.src = new URL("mathjax/tex-svg-full.js", document.currentScript.src);
mathjax.async = true;
document.head.append(mathjax);
