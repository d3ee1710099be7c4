/* The ledger's filter: chapter, verdict and model. Without this script the page shows every claim. */
(() => {
  const claims = [...document.querySelectorAll("details.claim")];
  const place = document.getElementById("ledger-filter");

  /* A link to a claim opens it, as does coming back to one. */
  function open() {
    const wanted = document.getElementById(location.hash.slice(1));
    const details = wanted?.closest("details.claim");
    if (details) { details.open = true; details.scrollIntoView(); }
  }
  window.addEventListener("hashchange", open);
  open();
  if (!place) return;

  const classes = (prefix) => [...new Set(claims.flatMap((claim) => [...claim.classList]))].filter((name) => name.startsWith(prefix));
  const choices = {
    chapter: classes("chapter-").map((name) => [name, name.slice(8).replace("-", ".")]),
    verdict: [["verdict-holds", "holds, or seen"], ["verdict-fails", "does not hold, or not seen"]],
    model: classes("model-").map((name) => [name, {tiny: "nano", smol: "SmolLM2-135M", gpu: "a GPU"}[name.slice(6)]]),
  };
  place.innerHTML = Object.entries(choices).map(([name, options]) =>
    `<label>${name} <select><option value="claim">all</option>${options.map(([value, text]) => `<option value="${value}">${text}</option>`).join("")}</select></label>`,
  ).join("") + '<span role="status"></span>';

  place.addEventListener("input", () => {
    const wanted = [...place.querySelectorAll("select")].map((select) => select.value);
    for (const claim of claims) claim.hidden = !wanted.every((name) => claim.classList.contains(name));
    for (const part of document.querySelectorAll("section:has(> details.claim)"))
      part.hidden = ![...part.querySelectorAll("details.claim")].some((claim) => !claim.hidden);
    place.querySelector("[role=status]").textContent = `${claims.filter((claim) => !claim.hidden).length} of ${claims.length} claims`;
  });
})();
