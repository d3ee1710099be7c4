/* Sphinx's scores, with chapters before the other pages, and these before the API. */
var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    score + (page.startsWith("notebooks/") ? 30 : page.startsWith("book/api/") ? -30 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
