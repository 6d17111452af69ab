/**
 * Draws one grid of layers by experts on a canvas. Only cells whose colour changed are drawn again, colour by colour;
 * wide cells carry note heads on a staff line, narrow ones are blocks. A second canvas above holds what spans cells:
 * the veil over groups that did not survive and the line through the heaviest expert of each layer.
 */
import { el } from './elements.js';
import { Geometry } from './geometry.js';
import { KEPT_OUT, LET_IN, NEAR } from './score.js';
import { DISK, READING } from './tiers.js';

const LEVELS = 32;
const KINDS = 6;
const MUTED = KINDS * LEVELS; // added to the code of a muted cell
const RAMPS = ['--play', '--let-in', '--kept-out', '--near', '--play', '--more-b'];

export class Grid {
  /** @param {HTMLElement} host  @param {object} model  @param {import('./lights.js').Lights} lights */
  constructor(host, model, lights) {
    Object.assign(this, { host, model, lights });
    this.base = el('canvas', { 'aria-hidden': 'true' });
    this.over = el('canvas', { 'aria-hidden': 'true', class: 'over' });
    this.tiers = el('canvas', { 'aria-hidden': 'true', class: 'tiers' });
    host.replaceChildren(this.base, this.tiers, this.over);
    this.pen = this.base.getContext('2d', { alpha: false });
    this.overPen = this.over.getContext('2d');
    this.muted = new Uint8Array(lights.value.length);
    this.drawn = new Uint16Array(lights.value.length);
    this.next = new Int32Array(lights.value.length);
    this.heads = new Int32Array(2 * MUTED);
    this.painted = 0; // cells painted in the last frame, for the tests
    this.fit();
  }

  /** Fits the canvases to the host's width and paints everything. */
  fit() {
    const ratio = window.devicePixelRatio || 1;
    const width = this.host.clientWidth;
    if (!width) return;
    this.geometry = new Geometry(this.model, width, ratio);
    for (const canvas of [this.base, this.tiers, this.over]) {
      canvas.width = this.geometry.width;
      canvas.height = this.geometry.height;
      canvas.style.width = `${this.geometry.width / ratio}px`;
      canvas.style.height = `${this.geometry.height / ratio}px`;
    }
    this.recolour();
  }

  /** Takes the colours anew from the style sheet (the theme may have changed) and paints everything. */
  recolour() {
    const probe = el('span', { hidden: true });
    this.host.append(probe);
    const style = getComputedStyle(probe);
    const colour = (name) => {
      probe.style.color = `var(${name})`; // as a colour of an element it is resolved for the theme in force
      return style.color;
    };
    this.ink = Object.fromEntries(['--ground', '--staff', '--bar', '--faint', '--road', '--muted-mark', '--tier', '--tier-disk'].map((name) => [name, colour(name)]));
    const cell = this.geometry.notes ? colour('--ground') : colour('--cell');
    this.ramps = RAMPS.map((name) => ramp([cell, colour(name), colour(`${name}-bright`)]));
    this.font = style.fontFamily;
    probe.remove();
    this.paintGround();
    this.drawn.fill(0xffff);
    this.paint();
  }

  /** A colour of the style sheet, resolved for the theme in force. */
  colourOf(name) {
    const probe = el('span', { hidden: true });
    this.host.append(probe);
    probe.style.color = `var(${name})`;
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  }

  paintGround() {
    const { pen, geometry: g, ink } = this;
    pen.fillStyle = ink['--ground'];
    pen.fillRect(0, 0, g.width, g.height);
    pen.fillStyle = ink['--bar'];
    const thin = Math.max(1, Math.round(g.ratio));
    for (const [at, x] of g.bars().entries()) {
      const first = g.notes ? g.y(0) + g.rowStep / 2 : g.y(0);
      const last = g.notes ? g.y(g.rows - 1) + g.rowStep / 2 : g.y(g.rows - 1) + g.rowHeight;
      pen.fillRect(Math.round(x - thin / 2), first, at === g.bars().length - 1 && g.notes ? thin * 3 : thin, last - first + thin);
      if (g.notes) for (let row = 0; row < g.rows; row += 1) this.staff(x - g.gap / 2, row, g.gap + 1);
    }
    this.numbers();
  }

  numbers() {
    const { pen, geometry: g, ink } = this;
    pen.fillStyle = ink['--faint'];
    pen.font = `${Math.round(10.5 * g.ratio)}px ${this.font}`;
    pen.textBaseline = 'middle';
    pen.textAlign = 'right';
    const every = g.rowStep >= 13 * g.ratio ? 1 : 10;
    this.model.layers.forEach((name, row) => {
      const number = Number(/\d+$/.exec(name)?.[0] ?? row);
      if (number % every === 0 || row === 0) pen.fillText(String(number), g.left - 4 * g.ratio, g.y(row) + g.rowHeight / 2);
    });
    pen.textAlign = 'left';
    const apart = g.gap ? g.perGroup : Math.max(1, 2 ** Math.ceil(Math.log2(g.experts / 8)));
    for (let e = 0; e < g.experts; e += apart) pen.fillText(String(e), g.xs[e], g.top / 2);
  }

  /** Draws the cells that changed since they were last drawn. */
  paint() {
    const { lights, drawn, next, heads, muted } = this;
    heads.fill(-1);
    this.painted = 0;
    for (let cell = 0; cell < drawn.length; cell += 1) {
      const level = Math.round(lights.value[cell] * (LEVELS - 1));
      const code = lights.kind[cell] * LEVELS + level + (muted[cell] ? MUTED : 0);
      if (code === drawn[cell]) continue;
      drawn[cell] = code;
      next[cell] = heads[code];
      heads[code] = cell;
      this.painted += 1;
    }
    if (!this.painted) return;
    for (let code = 0; code < heads.length; code += 1) if (heads[code] >= 0) this.paintCode(code);
  }

  paintCode(code) {
    const kind = Math.floor((code % MUTED) / LEVELS);
    const level = code % LEVELS;
    const colour = this.ramps[kind][level];
    for (let cell = this.heads[code]; cell >= 0; cell = this.next[cell]) {
      const row = Math.floor(cell / this.model.experts);
      const expert = cell % this.model.experts;
      if (this.geometry.notes) this.note(row, expert, colour, kind, level);
      else this.block(row, expert, colour);
      if (code >= MUTED) this.cross(row, expert);
    }
  }

  block(row, expert, colour) {
    const g = this.geometry;
    this.pen.fillStyle = colour;
    this.pen.fillRect(g.xs[expert], g.y(row), g.widths[expert], g.rowHeight);
  }

  staff(x, row, width) {
    const g = this.geometry;
    this.pen.fillStyle = this.ink['--staff'];
    this.pen.fillRect(x, Math.round(g.y(row) + g.rowHeight / 2), width, Math.max(1, Math.round(g.ratio)));
  }

  note(row, expert, colour, kind, level) {
    const { pen, geometry: g } = this;
    pen.fillStyle = this.ink['--ground'];
    pen.fillRect(g.xs[expert], g.y(row), g.widths[expert], g.rowHeight);
    this.staff(g.xs[expert], row, g.widths[expert]);
    if (level === 0) return;
    const size = Math.min(g.widths[expert] * 0.46, g.rowHeight * 0.34) * (0.55 + 0.45 * Math.min(1, level / (LEVELS - 1)));
    pen.beginPath();
    const hollow = kind === KEPT_OUT || kind === NEAR;
    const x = g.xs[expert] + g.widths[expert] / 2;
    const y = Math.round(g.y(row) + g.rowHeight / 2) + g.ratio / 2;
    pen.ellipse(x, y, size * (hollow ? 0.78 : 1), size * (hollow ? 0.58 : 0.74), -0.35, 0, 2 * Math.PI);
    if (!hollow) {
      pen.fillStyle = colour;
      pen.fill();
      if (kind === LET_IN) pen.fillRect(x + size * 0.82, y - size * 2.1, 1.6 * g.ratio, size * 1.9); // a stem, for eyes that see no green
      return;
    }
    pen.fillStyle = this.ink['--ground'];
    pen.fill(); // the staff does not run through a hollow head
    pen.strokeStyle = colour;
    pen.lineWidth = 1.6 * g.ratio;
    pen.setLineDash(kind === NEAR ? [2.2 * g.ratio, 1.8 * g.ratio] : []);
    pen.stroke();
    pen.setLineDash([]);
  }

  /** The mark of a muted cell: a cross, as printed music marks a note that is not to sound. */
  cross(row, expert) {
    const { pen, geometry: g } = this;
    const half = Math.max(1.5, Math.min(g.widths[expert], g.rowHeight) * (g.notes ? 0.24 : 0.5));
    const x = g.xs[expert] + g.widths[expert] / 2;
    const y = g.y(row) + g.rowHeight / 2;
    pen.strokeStyle = this.ink['--muted-mark'];
    pen.lineWidth = Math.max(1, (g.notes ? 2 : 1) * g.ratio);
    pen.beginPath();
    pen.moveTo(x - half, y - half);
    pen.lineTo(x + half, y + half);
    pen.moveTo(x - half, y + half);
    pen.lineTo(x + half, y - half);
    pen.stroke();
  }

  /** Draws token t's road over the cells, or takes it away (t null). */
  paintRoad(score, t) {
    const { overPen: pen, geometry: g } = this;
    pen.clearRect(0, 0, g.width, g.height);
    if (t === null) return;
    const line = [];
    for (let row = 0; row < g.rows; row += 1) {
      const { players, groups } = score.decision(t, row);
      if (groups) this.veil(row, new Set(groups));
      if (players.length) line.push([g.xs[players[0].expert] + g.widths[players[0].expert] / 2, g.y(row) + g.rowHeight / 2]);
    }
    pen.strokeStyle = this.ink['--road'];
    pen.lineWidth = (g.notes ? 1.5 : 1) * g.ratio;
    pen.lineJoin = 'round';
    pen.beginPath();
    for (const [x, y] of line) pen.lineTo(x, y);
    pen.stroke();
  }

  /** Marks below the cells: a bar for an expert in memory, half a one while it is being read, a frame for one on disk. */
  paintTiers(cells) {
    const { geometry: g } = this;
    const pen = this.tiers.getContext('2d');
    pen.clearRect(0, 0, g.width, g.height);
    const high = Math.max(1, Math.round((g.notes ? 3 : 1) * g.ratio));
    const inset = g.notes ? 2 * g.ratio : 0;
    cells?.forEach((tier, cell) => {
      if (!tier) return;
      const [row, expert] = [Math.floor(cell / g.experts), cell % g.experts];
      const [left, width] = [g.xs[expert] + inset, Math.max(1, g.widths[expert] - 2 * inset)];
      const top = g.y(row) + g.rowHeight - high - (g.notes ? g.ratio : 0);
      pen.fillStyle = this.ink[tier === DISK ? '--tier-disk' : '--tier'];
      if (tier === DISK && g.notes) {
        pen.fillRect(left, top, width, g.ratio);
        pen.fillRect(left, top + high - g.ratio, width, g.ratio);
      } else pen.fillRect(left, top, tier === READING ? Math.max(1, width / 2) : width, high);
    });
  }

  veil(row, alive) {
    const { overPen: pen, geometry: g } = this;
    pen.fillStyle = this.ink['--ground'];
    pen.globalAlpha = 0.66;
    for (let e = 0; e < g.experts; e += g.perGroup) {
      if (alive.has(e / g.perGroup)) continue;
      const last = e + g.perGroup - 1;
      pen.fillRect(g.xs[e], g.y(row), g.xs[last] + g.widths[last] - g.xs[e], g.rowHeight);
    }
    pen.globalAlpha = 1;
  }
}

/** LEVELS colours from the first to the last of three. */
function ramp(stops) {
  const [dark, middle, bright] = stops.map((colour) => colour.match(/[\d.]+/g).slice(0, 3).map(Number));
  return Array.from({ length: LEVELS }, (_, level) => {
    const at = (2 * level) / (LEVELS - 1);
    const [from, to, part] = at <= 1 ? [dark, middle, at] : [middle, bright, at - 1];
    return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * part)).join(' ')})`;
  });
}
