// The answers of a static report: the server's filters over the rows that the report holds.

/** Answers from `{study, tests, explanations, suspects, progress, trust, pictures}`. */
export function keptAnswers(data) {
  const explanations = data.explanations;
  const routes = {
    study: () => data.study,
    trust: () => data.trust,
    test: (asked) => page(data.tests.filter((item) => passes(item, asked)), asked, ordered),
    suspects: (asked) => ({ ...page(data.suspects.filter((item) => suspected(item, asked)), asked), progress: { ...data.progress, settled: data.suspects.filter((item) => item.flagged && item.decision !== null).length } }),
    decisions: () => ({ seq: 0, changes: [] }),
  };
  function answer(path, asked) {
    if (path in routes) return routes[path](asked);
    const [, side, row] = /^explain\/(\w+)\/(.+)$/.exec(path) ?? [];
    const found = explanations[`${side}/${row}`];
    if (found === undefined) throw new Error(`This report does not hold the explanation of ${side} row ${row}.`);
    const k = Number(asked.k ?? 5);
    const short = (target) => ({ ...target, proponents: target.proponents.slice(0, k), opponents: target.opponents.slice(0, k) });
    return { ...found, targets: found.targets.map(short) };
  }
  return { answer, explanations, pictures: data.pictures };
}

function page(items, asked, order = (all) => all) {
  const start = Number(asked.offset ?? 0);
  return { total: items.length, items: order(items, asked).slice(start, start + Number(asked.limit ?? 60)) };
}

function passes(item, asked) {
  const sure = item.confidence ?? 0.5;
  if (asked.show === "wrong" && item.correct !== false) return false;
  if (asked.show === "right" && item.correct !== true) return false;
  if (asked.label !== undefined && item.label !== asked.label) return false;
  if (asked.predicted !== undefined && item.predicted !== asked.predicted) return false;
  if (sure < Number(asked.min ?? 0) || sure > Number(asked.max ?? 1)) return false;
  const words = [item.row, item.label, item.predicted, item.face.text, ...(item.face.rows ?? []).flat()].join(" ").toLowerCase();
  return (asked.search ?? "").toLowerCase().split(/\s+/).every((word) => words.includes(word));
}

function ordered(items, asked) {
  const key = { confidence: "confidence", loss: "loss" }[asked.order] ?? "row";
  const sign = asked.down === "1" ? -1 : 1;
  return [...items].sort((one, other) => sign * (one[key] - other[key]) || one.row - other.row);
}

function suspected(item, asked) {
  if (asked.given !== undefined && item.given !== asked.given) return false;
  if (asked.suggested !== undefined && item.suggested !== asked.suggested) return false;
  const decided = item.decision !== null;
  return { all: true, flagged: item.flagged, decided, undecided: item.flagged && !decided }[asked.show ?? "flagged"];
}
