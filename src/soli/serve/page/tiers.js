/**
 * A model larger than memory: which experts the server has in memory now, which it is reading, and which are on disk; and
 * in words where the experts of a token were when it needed them. For a model in memory there is none of it.
 */
import { getTiers } from './api.js';
import { byId, el } from './elements.js';
import { TIERS } from './score.js';
import { t } from './strings.js';
import { rich } from './terms.js';

const EVERY = 4000; // milliseconds between two questions, and
const EVERY_PLAYING = 1000; // while an answer comes
const SIGNS = { memory: '', reading: '⇣', disk: '↓' };
const NAMES = { memory: 'tierMemory', reading: 'tierReading', disk: 'tierDisk' };
const CELL_NAMES = { memory: 'cellMemory', reading: 'cellReading', disk: 'cellDisk' };
const SENTENCES = { memory: 'expertMemory', reading: 'expertReading', disk: 'expertDisk' };

export const [, MEMORY, READING, DISK] = TIERS.keys();

const tierName = (tier) => t(NAMES[tier]);

/** A tier at the end of a cell's description; empty where nothing is known. */
export const tierOfCell = (tier) => (tier ? t(CELL_NAMES[tier]) : '');

/** Where an expert is now, as a sentence; none for a model in memory. */
export const tierNow = (tier) => (tier ? [el('p', { class: 'about', id: 'tier-now' }, ...rich(SENTENCES[tier]))] : []);

export const milliseconds = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));
const megabytes = (bytes) => `${bytes < 1e8 ? (bytes / 1e6).toPrecision(3) : Math.round(bytes / 1e6)} MB`;

/** The sign of an expert that was not in memory, and its words for those who do not see it. */
export function tierSign(tier) {
  if (!tier || tier === 'memory') return null;
  return el('span', { class: `tier ${tier}`, title: tierName(tier) }, SIGNS[tier], el('span', { class: 'unseen' }, ` ${tierName(tier)}`));
}

/** The signs for the summary of a layer: ↓7. */
export const tierSigns = (players) => players.filter(({ tier }) => tier === 'disk' || tier === 'reading').map(({ tier, expert }) => [`tier ${tier}`, `${SIGNS[tier]}${expert}`, tierName(tier)]);

/** What a layer waited; null if it did not. */
export const layerCost = (cost) => (cost?.bytes ? el('small', { class: 'cost' }, ...rich('layerCost', { ms: milliseconds(cost.waited) })) : null);

/** The same with what was read, and with whom the token shares it. */
export function layerCostLong(cost) {
  if (!cost?.bytes) return null;
  const shared = cost.tokens > 1 ? rich('costShared', { count: cost.tokens }) : [];
  return el('p', { class: 'about' }, ...rich('layerCostLong', { ms: milliseconds(cost.waited), size: megabytes(cost.bytes) }), ...shared);
}

/** Where all experts of a token were, and what its layers waited; null for a model in memory. */
export function tokenCost(rows) {
  const costs = rows.map(({ decision }) => decision.cost).filter(Boolean);
  if (!costs.length) return null;
  const players = rows.flatMap(({ decision }) => decision.players);
  const [, memory, reading, disk] = TIERS.map((tier) => players.filter((player) => player.tier === tier).length);
  const waited = costs.reduce((sum, cost) => sum + cost.waited, 0);
  const shared = costs[0].tokens > 1 ? rich('costShared', { count: costs[0].tokens }) : [];
  return el('p', { class: 'about' }, ...rich('tokenCost', { all: players.length, memory, reading, disk, ms: milliseconds(waited) }), ...shared);
}

/** What the server has in memory now: a cell for each expert of each layer. */
export class Tiers {
  /** @param {object} model  @param {{changed: () => void, playing: () => boolean}} does */
  constructor(model, does) {
    Object.assign(this, { model, does, timer: 0 });
    this.cells = new Uint8Array(model.layers.length * model.experts);
    for (const one of document.querySelectorAll('.paged')) one.hidden = !model.paged;
    if (model.paged) this.ask();
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (document.hidden ? this.later() : this.ask()), this.does.playing() ? EVERY_PLAYING : EVERY);
  }

  /** Asks now. Without an answer what was known stays: the watch says that the server is gone. */
  async ask() {
    if (!this.model.paged) return;
    try {
      this.take((await getTiers()).layers);
    } catch {
      // as above
    }
    this.later();
  }

  take(layers) {
    this.cells.fill(DISK);
    const rowOf = new Map(this.model.layers.map((name, row) => [name, row]));
    for (const { layer, memory, reading } of layers) {
      if (!rowOf.has(layer)) continue;
      const first = rowOf.get(layer) * this.model.experts;
      for (const expert of memory) this.cells[first + expert] = MEMORY;
      for (const expert of reading) this.cells[first + expert] = READING;
    }
    this.rename();
    this.does.changed();
  }

  of(row, expert) { return TIERS[this.cells[row * this.model.experts + expert]]; }

  /** How many are in memory, in the page's language. */
  rename() {
    if (!this.model.paged) return;
    const count = (tier) => this.cells.reduce((sum, cell) => sum + (cell === tier), 0);
    const values = { memory: count(MEMORY), reading: count(READING), all: this.cells.length };
    const key = JSON.stringify(values) + document.documentElement.lang;
    if (byId('tiers-now').dataset.key === key) return; // its terms must not lose the focus
    byId('tiers-now').dataset.key = key;
    byId('tiers-now').replaceChildren(...rich('tiersNow', values));
  }
}
