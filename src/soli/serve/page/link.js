/**
 * The page's state as the fragment of an address, which browsers never send to a server: the mode, the text or texts,
 * the language of the translation, masked experts, the selected token, the view. A fragment can come from anybody, so
 * everything in it is checked against the model and bounded; what does not fit is left out.
 */
const LONGEST_FRAGMENT = 40000; // characters, percent-encoded
const LONGEST_TEXT = 8000;
const MOST_MASKED = 1024;

/**
 * @param {string} hash  location.hash
 * @param {{layers: string[], experts: number, modes: string[]}} model
 * @param {(row: number) => number} numberOf  the number in a layer's name
 * @returns {null | {mode: string, text: string|null, textB: string|null, to: string, masked: string[], onlyB: boolean,
 *          token: number|null, part: number, view: string|null}}  null: the fragment is no link of this page
 */
export function readLink(hash, model, numberOf) {
  if (hash.length < 2 || hash.length > LONGEST_FRAGMENT) return null;
  const fields = new URLSearchParams(hash.slice(1));
  if (!['text', 'mode', 'masked', 'view'].some((name) => fields.has(name))) return null;
  const one = (name, allowed) => (allowed.includes(fields.get(name)) ? fields.get(name) : null);
  const text = (name) => {
    const value = fields.get(name);
    return value?.trim() ? value.slice(0, LONGEST_TEXT) : null;
  };
  const token = fields.get('token') ?? '';
  return {
    mode: one('mode', model.modes) ?? model.modes[0],
    text: text('text'),
    textB: text('b'),
    to: one('to', ['en', 'zh']) ?? '',
    masked: readMasked(fields.get('masked') ?? '', model, numberOf),
    onlyB: fields.get('only-b') === '1',
    token: /^\d{1,6}$/.test(token) ? Number(token) : null,
    part: fields.get('part') === 'b' ? 1 : 0,
    view: one('view', ['simple', 'detailed']),
  };
}

/** "4.12,4.13" (layer number, expert) as row:expert, without what this model does not have. */
function readMasked(list, model, numberOf) {
  const rowOf = new Map(model.layers.map((_, row) => [numberOf(row), row]));
  const pairs = new Set();
  for (const entry of list.split(',').slice(0, MOST_MASKED)) {
    const [, layer, expert] = /^(\d{1,6})\.(\d{1,6})$/.exec(entry) ?? [];
    const row = rowOf.get(Number(layer));
    if (row !== undefined && Number(expert) < model.experts) pairs.add(`${row}:${Number(expert)}`);
  }
  return [...pairs];
}

/** The fragment, with its #, of a state as `readLink` returns it. */
export function writeLink(state, numberOf) {
  const fields = new URLSearchParams({ mode: state.mode, text: state.text.slice(0, LONGEST_TEXT) });
  if (state.textB !== null) fields.set('b', state.textB.slice(0, LONGEST_TEXT));
  if (state.to) fields.set('to', state.to);
  if (state.masked.length) {
    fields.set('masked', state.masked.map((pair) => {
      const [row, expert] = pair.split(':').map(Number);
      return `${numberOf(row)}.${expert}`;
    }).join(','));
  }
  if (state.onlyB) fields.set('only-b', '1');
  if (state.token !== null) fields.set('token', String(state.token));
  if (state.part) fields.set('part', 'b');
  if (state.view === 'detailed') fields.set('view', state.view);
  return `#${fields}`;
}
