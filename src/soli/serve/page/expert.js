/**
 * What one expert plays: in this passage and in the earlier texts of this visitor, from the tokens that this page has
 * received; and how often since the server started, in everybody's texts, as a count.
 */
import { getExpert } from './api.js';
import { el, harmless, visible } from './elements.js';
import { LET_IN } from './score.js';
import { t } from './strings.js';
import { rich } from './terms.js';
import { tierNow } from './tiers.js';

const KINDS = ['chinese', 'english', 'digits', 'punctuation', 'other'];
const MOST_HERE = 24;
const MOST_EXCERPTS = 12;
const CONTEXT = 3; // tokens shown before and after one
let requests = 0; // an answer about an expert that is no longer shown is dropped

const percent = (share) => `${Math.round(100 * share)} %`;

/**
 * @param {HTMLElement} host
 * @param {{row: number, expert: number, name: string, number: number, muted: boolean, parts: object[], scores: object[],
 *          toggleMute: () => void, chooseToken: (part: object, index: number) => void}} shown  `scores`: of all texts of
 *   this visitor
 */
export async function showExpert(host, { row, expert, name, number, muted, parts, scores, toggleMute, chooseToken }) {
  requests += 1;
  const own = requests;
  const counts = el('div', {}, el('p', { class: 'about' }, '…'));
  host.replaceChildren(
    el('div', { class: 'title' }, el('h3', {}, name),
      el('button', { type: 'button', id: 'mute', 'aria-pressed': String(muted), onClick: toggleMute }, t(muted ? 'unmuteThis' : 'mute'))),
    el('h4', {}, ...rich('here')), ...parts.map((part) => here(part, row, expert, parts.length > 1, chooseToken)),
    el('h4', {}, t('yours')), excerpts(scores, row, expert),
    el('h4', {}, t('since')), counts,
  );
  try {
    const report = await getExpert(number, expert);
    if (own === requests) counts.replaceChildren(...sinceStart(report));
  } catch (error) {
    if (own === requests) counts.replaceChildren(el('p', { class: 'about' }, t('failed', { why: error.message })));
  }
}

function here(part, row, expert, lettered, chooseToken) {
  const { score } = part;
  const letter = lettered ? el('b', {}, `${part.letter} `) : null;
  const plays = playsIn(score, row, expert);
  if (!plays.length) return el('p', { class: 'about' }, letter, t('nothingHere'));
  return el('p', { class: 'tokens' }, letter, ...plays.slice(0, MOST_HERE).map(({ i, share }) => el('button', {
    type: 'button', class: `token ${score.tokens[i].part}`, onClick: () => chooseToken(part, i),
  }, visible(score.tokens[i].text), el('small', {}, ` ${percent(share)}`))));
}

/** The tokens for which the expert plays, the heaviest first. */
function playsIn(score, row, expert) {
  const plays = [];
  for (let i = 0; i < score.length; i += 1) {
    const mention = score.mention(i, row, expert);
    if (mention && mention.kind <= LET_IN) plays.push({ i, share: mention.share, score });
  }
  return plays.sort((a, b) => b.share - a.share);
}

/** The heaviest tokens of all texts with the words around them; the same words are shown once. */
function excerpts(scores, row, expert) {
  const plays = scores.flatMap((score) => playsIn(score, row, expert)).sort((a, b) => b.share - a.share);
  const lines = new Map();
  for (const { i, share, score } of plays) {
    const text = (from, to) => score.tokens.slice(Math.max(0, from), to).map((token) => token.text).join('');
    const line = { before: text(i - CONTEXT, i), token: score.tokens[i].text, after: text(i + 1, i + 1 + CONTEXT), share };
    const words = JSON.stringify([line.before, line.token, line.after]);
    if (!lines.has(words)) lines.set(words, line);
    if (lines.size === MOST_EXCERPTS) break;
  }
  if (!lines.size) return el('p', { class: 'about' }, t('nothingYours'));
  return el('ol', { class: 'repertoire' }, ...[...lines.values()].map(({ before, token, after, share }) => el('li', {},
    el('span', { class: 'before' }, harmless(before)), el('b', {}, visible(token)),
    el('span', { class: 'after' }, harmless(after)), el('small', {}, percent(share)))));
}

function sinceStart({ selected: plays, tokens_read: read, kinds, tier }) {
  if (!plays) return [...tierNow(tier), el('p', { class: 'about' }, ...rich('neverChosen', { read }))];
  const all = KINDS.reduce((sum, kind) => sum + (kinds[kind] ?? 0), 0) || 1;
  return [
    ...tierNow(tier),
    el('p', { class: 'about' }, ...rich('sinceAbout', { plays, read, share: ((100 * plays) / read).toFixed(1) })),
    el('ul', { class: 'kinds', 'aria-label': t('kinds') }, ...KINDS.map((kind) => kindLine(kind, kinds[kind] ?? 0, all))),
  ];
}

function kindLine(kind, count, all) {
  const bar = el('span', { class: 'bar', 'aria-hidden': 'true' });
  bar.style.width = `${(100 * count) / all}%`;
  return el('li', { 'aria-label': t('kindCount', { kind: t(kind), count, share: Math.round((100 * count) / all) }) },
    el('span', { class: 'kind' }, t(kind)), el('span', { class: 'track' }, bar), el('span', { class: 'number' }, percent(count / all)));
}
