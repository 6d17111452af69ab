/** What one expert plays: in this passage, from the tokens on the page; and since the server started, as it says. */
import { getExpert } from './api.js';
import { el, harmless, visible } from './elements.js';
import { LET_IN } from './score.js';
import { t } from './strings.js';

const KINDS = ['chinese', 'english', 'digits', 'punctuation', 'other'];
const MOST_HERE = 24;
const ASKED = 32; // tokens since the start; the same words at the same place are shown once
const MOST_SINCE = 12;
let asked = 0; // an answer about an expert that is no longer shown is dropped

/**
 * @param {HTMLElement} host
 * @param {{row: number, expert: number, name: string, number: number, muted: boolean, parts: object[],
 *          toggleMute: () => void, chooseToken: (part: object, index: number) => void}} shown
 */
export async function showExpert(host, { row, expert, name, number, muted, parts, toggleMute, chooseToken }) {
  asked += 1;
  const mine = asked;
  const since = el('div', {}, el('p', { class: 'about' }, '…'));
  host.replaceChildren(
    el('div', { class: 'title' }, el('h3', {}, name),
      el('button', { type: 'button', id: 'mute', 'aria-pressed': String(muted), onClick: toggleMute }, t(muted ? 'unmuteThis' : 'mute'))),
    el('h4', {}, t('here')), ...parts.map((part) => here(part, row, expert, parts.length > 1, chooseToken)),
    el('h4', {}, t('since')), since,
  );
  try {
    const found = await getExpert(number, expert, ASKED);
    if (mine === asked) since.replaceChildren(...sinceStart(found));
  } catch (error) {
    if (mine === asked) since.replaceChildren(el('p', { class: 'about' }, t('failed', { why: error.message })));
  }
}

function here(part, row, expert, lettered, chooseToken) {
  const { score } = part;
  const found = [];
  for (let i = 0; i < score.length; i += 1) {
    const mention = score.mention(i, row, expert);
    if (mention && mention.kind <= LET_IN) found.push({ i, share: mention.share });
  }
  found.sort((a, b) => b.share - a.share);
  const letter = lettered ? el('b', {}, `${part.letter} `) : null;
  if (!found.length) return el('p', { class: 'about' }, letter, t('nothingHere'));
  return el('p', { class: 'tokens' }, letter, ...found.slice(0, MOST_HERE).map(({ i, share }) => el('button', {
    type: 'button', class: `token ${score.tokens[i].part}`, onClick: () => chooseToken(part, i),
  }, visible(score.tokens[i].text), el('small', {}, ` ${Math.round(100 * share)} %`))));
}

function sinceStart({ selected: plays, tokens_read: read, tokens, kinds }) {
  if (!plays) return [el('p', { class: 'about' }, t('neverChosen', { read }))];
  const all = KINDS.reduce((sum, kind) => sum + (kinds[kind] ?? 0), 0) || 1;
  return [
    el('ul', { class: 'kinds', 'aria-label': t('kinds') }, ...KINDS.map((kind) => kindLine(kind, kinds[kind] ?? 0, all))),
    el('p', { class: 'about' }, t('sinceAbout', { plays, read })),
    el('ol', { class: 'repertoire' }, ...distinct(tokens).slice(0, MOST_SINCE).map((token) => el('li', {},
      el('span', { class: 'before' }, harmless(token.before ?? '')), el('b', {}, visible(token.text)),
      el('span', { class: 'after' }, harmless(token.after ?? '')), el('small', {}, token.weight.toFixed(2))))),
  ];
}

/** Without tokens that were played alike in the same words. */
function distinct(tokens) {
  const seen = new Set();
  return tokens.filter(({ before, text, after }) => {
    const words = JSON.stringify([before, text, after]);
    return !seen.has(words) && seen.add(words);
  });
}

function kindLine(kind, count, all) {
  const bar = el('span', { class: 'bar', 'aria-hidden': 'true' });
  bar.style.width = `${(100 * count) / all}%`;
  const share = Math.round((100 * count) / all);
  return el('li', { 'aria-label': t('kindCount', { kind: t(kind), count, share }) },
    el('span', { class: 'kind' }, t(kind)), el('span', { class: 'track' }, bar), el('span', { class: 'number' }, `${share} %`));
}
