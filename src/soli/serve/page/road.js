/**
 * The road of one token: in each layer who plays with which share, what the bias changed, who was next in line. Layers
 * open to a table with every number of the decision; few layers are all open, of many only the one that is looked at.
 */
import { el, visible } from './elements.js';
import { KEPT_OUT, LET_IN, NEAR } from './score.js';
import { t } from './strings.js';
import { rich } from './terms.js';
import { layerCost, layerCostLong, tierSign, tierSigns, tokenCost } from './tiers.js';

const ALL_OPEN = 6; // models with up to so many layers show every table
const KIND = ['plays', 'letInShort', 'keptOutShort', 'near'];
const MOST_SIGNS = 26; // characters; more are counted instead
const CLASS = ['plays', 'let-in', 'kept-out', 'near'];

/**
 * @param {HTMLElement} host
 * @param {{model: object, score: import('./score.js').Score, index: number, simple: boolean, chooseExpert: (row: number, expert: number) => void}} shown
 *   `simple`: only who plays with which share
 */
export function showRoad(host, { model, score, index, simple, chooseExpert }) {
  const token = score.tokens[index];
  const rows = model.layers.map((name, row) => ({ name, row, decision: score.decision(index, row) }));
  const swayed = rows.filter(({ decision }) => decision.keptOut.length).length;
  const title = el('h3', {}, el('span', { class: `token big ${token.part}` }, visible(token.text)));
  const part = token.part === 'answer' ? 'Answer' : 'Prompt';
  const about = el('p', { class: 'about' }, ...rich(`road${simple ? 'Simple' : 'About'}${part}`, { position: token.position, swayed, layers: rows.length }));
  const list = el('div', { class: 'road' }, ...rows.map((layer) => (simple ? players(layer, chooseExpert) : layerOf(layer, model, chooseExpert))));
  const key = simple ? [] : [el('p', { class: 'about' }, ...rich('roadSigns'))];
  host.replaceChildren(title, about, ...[tokenCost(rows)].filter(Boolean), ...key, list);
}

/** A layer of the simple view: a button for each player, as wide as its share. */
function players({ name, row, decision }, chooseExpert) {
  return el('div', { class: 'layer players' }, el('span', { class: 'name' }, name), el('span', { class: 'all' }, ...decision.players.map((player) => {
    const button = el('button', { type: 'button', class: `expert ${player.tier}`, onClick: () => chooseExpert(row, player.expert) },
      el('span', { class: 'unseen' }, `${t('expert')} `), player.expert, el('small', {}, ` ${(100 * player.share).toFixed(0)} %`), tierSign(player.tier));
    button.style.flexGrow = String(Math.round(100 * player.share));
    return button;
  })), layerCost(decision.cost));
}

function layerOf({ name, row, decision }, model, chooseExpert) {
  const box = el('details', { class: 'layer', open: model.layers.length <= ALL_OPEN });
  const fill = () => {
    if (box.open && box.children.length === 1) box.append(...tableOf(row, decision, model, chooseExpert));
  };
  box.append(el('summary', {}, el('span', { class: 'name' }, name), shares(decision), signs(decision)));
  box.addEventListener('toggle', fill);
  fill();
  return box;
}

/** The routed weight of a layer as one bar, a piece for each player. */
function shares({ players }) {
  const bar = el('span', { class: 'shares', 'aria-hidden': 'true' });
  for (const player of players) {
    const piece = el('span', { class: CLASS[player.kind] }, player.share > 0.09 ? player.expert : '');
    piece.style.flexGrow = String(player.share);
    bar.append(piece);
  }
  return bar;
}

/** As the terminal's score has it: +7 let in by the bias, -7 kept out by it, ~7 next in line. */
function signs({ players, keptOut, near }) {
  const letIn = players.filter((player) => player.kind === LET_IN);
  const next = near.slice(0, 1).map((one) => ['near', `~${one.expert}`, t('near')]);
  let marks = [
    ...letIn.map((player) => ['let-in', `+${player.expert}`, t('letIn')]),
    ...keptOut.map((out) => ['kept-out', `−${out.expert}`, t('keptOut')]),
  ];
  if (marks.reduce((length, [, sign]) => length + sign.length + 1, 0) > MOST_SIGNS) marks = [
    ['let-in', t('countIn', { count: letIn.length }), t('letIn')],
    ['kept-out', t('countOut', { count: keptOut.length }), t('keptOut')],
  ];
  marks.push(...next, ...tierSigns(players));
  return el('span', { class: 'signs' }, ...marks.map(([kind, sign, title]) => el('span', { class: kind, title }, sign)));
}

function tableOf(row, decision, model, chooseExpert) {
  const { players, keptOut, near, groups, last } = decision;
  // An expert kept out by the bias is often next in line as well: one line for both, with its margin.
  const nextOf = new Map(near.map((next) => [next.expert, next]));
  const out = keptOut.map((one) => ({ ...one, margin: nextOf.get(one.expert)?.margin ?? NaN }));
  const outs = new Set(out.map((one) => one.expert));
  const lines = [...players, ...out, ...near.filter((next) => !outs.has(next.expert))];
  const scale = scaleOf(lines);
  const alive = groups ? new Set(groups) : null;
  const group = (expert) => Math.floor(expert / (model.experts / model.groups));
  const body = lines.map((line) => el('tr', { class: CLASS[line.kind] },
    el('th', { scope: 'row' }, el('button', { type: 'button', class: 'expert', onClick: () => chooseExpert(row, line.expert) },
      t('expertNumber', { expert: line.expert }), tierSign(line.tier))),
    el('td', {}, roleOf(line, alive && !alive.has(group(line.expert)) ? group(line.expert) : null)),
    el('td', { class: 'number' }, line.share ? `${(100 * line.share).toFixed(0)} %` : ''),
    el('td', { class: 'number' }, figure(line.affinity)),
    el('td', { class: 'number' }, signed(line.biased - line.affinity)),
    el('td', { class: 'number' }, figure(line.biased)),
    el('td', { class: 'plot', 'aria-hidden': 'true' }, plot(line, scale, last))));
  const heads = ['headExpert', 'headRole', 'headWeight', 'headAffinity', 'headBias', 'headRanked'].map((key) => el('th', { scope: 'col' }, ...rich(key)));
  const table = el('table', {}, el('thead', {}, el('tr', {}, ...heads, el('td'))), el('tbody', {}, ...body));
  const survived = groups ? el('p', { class: 'about' }, ...rich('groupsSurvived', { groups: groups.join(', '), of: model.groups })) : null;
  return [el('div', { class: 'scroll' }, table), survived, layerCostLong(decision.cost)].filter(Boolean);
}

function roleOf(line, deadGroup) {
  if (line.kind === KEPT_OUT && deadGroup !== null) return t('groupOut', { group: deadGroup });
  if (line.kind === NEAR) return t('nearBy', { margin: figure(line.margin) });
  if (line.kind === KEPT_OUT && !Number.isNaN(line.margin)) return t('keptOutBy', { margin: figure(line.margin) });
  return t(KIND[line.kind]);
}

const figure = (value) => (Number.isNaN(value) ? '' : value.toFixed(Math.abs(value) < 0.01 ? 4 : 3));
const signed = (value) => (Number.isNaN(value) ? '' : `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(3)}`);

function scaleOf(lines) {
  const values = lines.flatMap((line) => [line.affinity, line.biased]).filter((value) => !Number.isNaN(value));
  const low = Math.min(...values);
  const high = Math.max(...values);
  return (value) => 8 + (84 * (value - low)) / (high - low || 1);
}

/** A dot at the affinity, a line as long as the bias, a head where it was ranked; upright: what the last player had. */
function plot(line, scale, last) {
  const box = el('span', { class: 'push' });
  const place = (name, left, width) => {
    const piece = el('span', { class: name });
    piece.style.left = `${left}%`;
    if (width !== undefined) piece.style.width = `${width}%`;
    box.append(piece);
  };
  place('cut', scale(last));
  if (!Number.isNaN(line.affinity)) {
    const [from, to] = [scale(line.affinity), scale(line.biased)];
    place('shaft', Math.min(from, to), Math.abs(to - from));
    place('from', from);
  }
  place('to', scale(line.biased));
  return box;
}
