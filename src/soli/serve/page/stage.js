/**
 * The stage: one grid for one prompt, two and their difference for two, all moved by one beat. Everything is drawn on
 * animation frames, and none is asked for while nothing moves.
 */
import { Cursor } from './cursor.js';
import { byId, el } from './elements.js';
import { Grid } from './grid.js';
import { Lights } from './lights.js';
import { Player } from './player.js';
import { Score } from './score.js';
import { Strip } from './strip.js';
import { t } from './strings.js';
import { DISK, tierOfCell, Tiers } from './tiers.js';

const LONGEST_FRAME = 0.1; // seconds; a tab that slept does not play everything at once

export class Stage {
  /**
   * @param {object} model  as the server describes it
   * @param {{tokenChosen: (part: object|null, index: number|null) => void, expertChosen: (row: number, expert: number) => void,
   *          muteToggled: (row: number, expert: number) => void, moved: () => void, more: () => boolean, nameOf: (row: number, expert: number) => string}} does
   */
  constructor(model, does) {
    Object.assign(this, { model, does, parts: [], difference: null, chosen: null, frameRequested: false, before: 0, common: null, simple: true });
    this.still = matchMedia('(prefers-reduced-motion: reduce)');
    this.player = new Player({
      length: () => Math.max(0, ...this.parts.map((part) => part.score.length)),
      more: () => does.more(),
      changed: () => this.moved(),
    });
    new ResizeObserver(() => this.refit()).observe(byId('grids'));
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.recolour());
    this.tiers = new Tiers(model, { changed: () => this.markTiers(), playing: () => does.more() });
    this.begin(1);
  }

  /** Marks where experts are now, or where those of the chosen token were when it needed them. */
  markTiers() {
    if (!this.model.paged) return;
    const now = this.tiers.cells.map((tier) => (tier === DISK ? 0 : tier));
    for (const part of this.parts) {
      const own = this.chosen?.part === part ? this.chosen.index : null;
      if (part.grid.geometry) part.grid.paintTiers(own === null ? now : part.score.tiersOf(own));
    }
  }

  /** A new piece for one prompt, or for two to compare. */
  begin(count) {
    const compared = count > 1;
    byId('grids').className = compared ? 'compared' : '';
    byId('grids').replaceChildren();
    byId('strips').replaceChildren();
    this.parts = Array.from({ length: count }, (_, n) => this.makePart(n, compared));
    this.difference = compared ? this.makeGrid('difference', t('difference'), null) : null;
    this.chosen = null;
    this.player.reset();
    this.does.tokenChosen(null, null);
    this.moved();
  }

  makePart(n, compared) {
    const letter = 'AB'[n];
    const score = new Score(this.model);
    const part = { n, letter, score, ...this.makeGrid(`grid-${letter.toLowerCase()}`, compared ? letter : '', n) };
    const host = el('div', { class: 'strip', id: `strip-${letter.toLowerCase()}` });
    byId('strips').append(host);
    part.strip = new Strip(host, (index) => this.choose(part, index));
    part.strip.rename();
    return part;
  }

  makeGrid(id, title, n) {
    const host = el('div', { class: 'grid', id });
    const heading = el('figcaption', { class: 'grid-title', data: { grid: id } }, title);
    byId('grids').append(el('figure', { class: id === 'difference' ? 'wide' : '' }, heading, host));
    const lights = new Lights(this.model);
    const grid = new Grid(host, this.model, lights);
    const cursor = new Cursor(grid, {
      label: n === null ? 'gridDifference' : 'grid',
      describe: (row, expert) => this.describe(n, row, expert),
      choose: this.does.expertChosen,
      mute: this.does.muteToggled,
    });
    return { lights, grid, cursor, heading };
  }

  /** Everything that is drawn, the difference too. */
  get shown() { return this.difference ? [...this.parts, this.difference] : this.parts; }

  /** Tokens have come for a part. */
  take(n, tokens) {
    const part = this.parts[n];
    for (const token of tokens) {
      part.score.add(token);
      part.strip.add(token);
    }
    this.wake();
  }

  /** Marks the muted cells; `sets` holds one set of "row:expert" per part. */
  mark(sets) {
    this.parts.forEach((part, n) => {
      const { muted } = part.grid;
      muted.fill(0);
      for (const pair of sets[n]) {
        const [row, expert] = pair.split(':').map(Number);
        muted[row * this.model.experts + expert] = 1;
      }
    });
    this.wake();
  }

  /** Shows the road of one token and stands still there; index null: back to the music. */
  choose(part, index) {
    if (index === null) {
      this.chosen = null;
      this.moved();
    } else {
      this.chosen = { part, index };
      this.player.seek(index + 1);
    }
    this.does.tokenChosen(this.chosen?.part ?? null, index);
  }

  step(by) {
    const part = this.chosen?.part ?? this.parts[0];
    const index = Math.max(0, Math.min(this.player.position + by, part.score.length)) - 1;
    if (part.score.length) this.choose(part, Math.max(0, index));
  }

  toggle() {
    if (this.chosen) this.choose(null, null);
    this.player.toggle();
  }

  replay() {
    if (this.chosen) this.choose(null, null);
    this.player.play(0);
  }

  seek(position) {
    if (position > 0) this.choose(this.parts[0].score.length >= position ? this.parts[0] : this.parts.at(-1), position - 1);
    else this.player.seek(0);
  }

  /** The player jumped, or what is chosen changed. */
  moved() {
    for (const part of this.parts) {
      const upTo = Math.min(this.player.position, part.score.length);
      if (part.lights.played !== upTo) part.lights.rewind(part.score, upTo);
      const own = this.chosen?.part === part ? this.chosen.index : null;
      part.strip.mark(own);
      if (part.grid.geometry) part.grid.paintRoad(part.score, this.simple ? null : own);
    }
    this.markTiers();
    this.compare();
    this.does.moved();
    this.wake();
  }

  compare() {
    const [a, b] = this.parts;
    this.common = this.difference ? this.difference.lights.showDifference(a.lights, b.lights) : null;
  }

  wake() {
    if (this.frameRequested) return;
    this.frameRequested = true;
    requestAnimationFrame((now) => this.frame(now));
  }

  frame(now) {
    this.frameRequested = false;
    const seconds = Math.min((now - this.before) / 1000, LONGEST_FRAME);
    this.before = now;
    const count = this.player.advance(seconds);
    const heard = () => this.parts.reduce((sum, { lights }) => sum + lights.played, 0);
    const before = heard();
    const goesOn = this.parts.map((part) => this.light(part, seconds));
    this.compare();
    for (const { grid } of this.shown) if (grid.geometry) grid.paint();
    for (const { strip } of this.parts) strip.flush(this.player.position);
    if (count || heard() !== before) this.does.moved();
    if (this.player.playing && (goesOn.some(Boolean) || !this.player.atEnd)) this.wake();
  }

  light(part, seconds) {
    const { score, lights } = part;
    const { position, playing, speed } = this.player;
    const still = this.still.matches;
    const sounding = playing && !still && lights.fade(seconds, Math.max(0.25, Math.min(0.9, 3 / speed)));
    for (let i = lights.played; i < Math.min(position, score.length); i += 1) lights.play(score, i);
    if (this.chosen?.part === part) lights.showToken(score, this.chosen.index, this.simple);
    else lights.showPresent(still);
    return sounding;
  }

  refit() {
    for (const { grid } of this.shown) if (grid.host.clientWidth !== grid.fitted) {
      grid.fitted = grid.host.clientWidth;
      grid.fit();
    }
    this.moved();
  }

  recolour() {
    for (const { grid } of this.shown) if (grid.geometry) grid.recolour();
    this.moved();
  }

  rename() {
    this.tiers.rename();
    for (const { cursor } of this.shown) cursor.rename();
    for (const { strip } of this.parts) strip.rename();
    if (this.difference) this.difference.heading.textContent = t('difference');
  }

  /** What a cell shows, in words. `n` null: the difference. */
  describe(n, row, expert) {
    const cell = row * this.model.experts + expert;
    const name = this.does.nameOf(row, expert);
    if (n === null) {
      const [a, b] = this.parts.map(({ lights }) => (lights.played ? lights.sums[cell] / lights.played : 0));
      return t('cellDifference', { name, a: (100 * a).toFixed(1), b: (100 * b).toFixed(1) });
    }
    const part = this.parts[n];
    const muted = part.grid.muted[cell] ? t('cellMuted') : '';
    if (this.chosen?.part === part) {
      const mention = part.score.mention(this.chosen.index, row, expert);
      const states = this.simple ? ['cellPlays', 'cellPlays', 'cellRests', 'cellRests'] : ['cellPlays', 'cellLetIn', 'cellKeptOut', 'cellNear'];
      const state = mention ? t(states[mention.kind], { share: Math.round(100 * mention.share) }) : t('cellRests');
      return `${name}: ${state}${muted}${tierOfCell(mention?.tier)}`;
    }
    return `${name}: ${t('cellPlayed', { count: part.lights.plays[cell], of: part.lights.played })}${muted}${tierOfCell(this.tiers.of(row, expert))}`;
  }
}
