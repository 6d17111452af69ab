/**
 * The grid for hands and ears: pointing and clicking, arrow keys, and a name for the cell under the cursor. Assistive
 * technology sees an ARIA grid of which only the cell at the cursor exists as an element (aria-activedescendant).
 */
import { byId, el } from './elements.js';
import { t } from './strings.js';

const STEPS = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0],
};

export class Cursor {
  /**
   * @param {import('./grid.js').Grid} grid
   * @param {{label: string, describe: (row: number, expert: number) => string,
   *          choose: (row: number, expert: number) => void, mute?: (row: number, expert: number) => void}} does
   */
  constructor(grid, does) {
    Object.assign(this, { grid, does, row: 0, expert: 0, turn: 0 });
    const { model, host } = grid;
    this.ring = el('div', { class: 'ring', 'aria-hidden': 'true', hidden: true });
    // Two cells take turns: a reader announces a new active element, but not a new name of the same one.
    this.cells = [0, 1].map((n) => el('div', { id: `${host.id}-cell-${n}`, role: 'gridcell', class: 'unseen' }));
    this.lines = this.cells.map((cell) => el('div', { role: 'row' }, cell));
    host.append(this.ring, ...this.lines);
    host.tabIndex = 0;
    for (const [name, value] of Object.entries({
      role: 'grid', 'aria-rowcount': model.layers.length, 'aria-colcount': model.experts, 'aria-readonly': 'true',
    })) host.setAttribute(name, value);
    this.rename();
    host.onkeydown = (event) => this.key(event);
    host.onfocus = () => this.show();
    host.onblur = () => {
      this.ring.hidden = true;
      byId('tip').hidden = true;
    };
    host.onpointermove = (event) => this.hover(event);
    host.onpointerleave = () => { byId('tip').hidden = true; };
    host.onclick = (event) => this.click(event);
  }

  rename() { this.grid.host.setAttribute('aria-label', t(this.does.label)); }

  key(event) {
    const step = STEPS[event.key];
    const { model } = this.grid;
    if (step) {
      const within = (value, size) => Math.max(0, Math.min(size - 1, value));
      this.row = within(this.row + step[0], model.layers.length);
      this.expert = within(this.expert + step[1], model.experts);
      this.show();
    } else if (event.key === 'Enter' || event.key === ' ') this.does.choose(this.row, this.expert);
    else if (event.key === 'm' && this.does.mute && !event.ctrlKey && !event.metaKey) {
      this.does.mute(this.row, this.expert);
      this.show();
    } else return;
    event.preventDefault();
  }

  /** Puts ring and name at the cursor; for eyes the name stands below the ring. */
  show() {
    this.place(this.ring, this.row, this.expert);
    this.ring.hidden = false;
    this.turn = 1 - this.turn;
    const [now, before] = [this.cells[this.turn], this.cells[1 - this.turn]];
    now.textContent = this.does.describe(this.row, this.expert);
    now.setAttribute('aria-colindex', String(this.expert + 1));
    this.lines[this.turn].setAttribute('aria-rowindex', String(this.row + 1));
    before.textContent = '';
    this.grid.host.setAttribute('aria-activedescendant', now.id);
    const at = this.ring.getBoundingClientRect();
    this.tell(now.textContent, at.left, at.bottom + 8);
  }

  tell(text, left, top) {
    const tip = byId('tip');
    tip.hidden = false;
    tip.textContent = text;
    Object.assign(tip.style, { left: `${Math.max(8, Math.min(left, window.innerWidth - tip.offsetWidth - 8))}px`, top: `${top}px` });
  }

  place(box, row, expert) {
    const at = this.grid.geometry.box(row, expert);
    Object.assign(box.style, { left: `${at.left}px`, top: `${at.top}px`, width: `${at.width}px`, height: `${at.height}px` });
  }

  cellOf(event) {
    const at = this.grid.base.getBoundingClientRect();
    return this.grid.geometry?.cellAt(event.clientX - at.left, event.clientY - at.top) ?? null;
  }

  hover(event) {
    const cell = event.pointerType === 'touch' ? null : this.cellOf(event);
    if (cell) this.tell(this.does.describe(cell.row, cell.expert), event.clientX + 14, event.clientY + 18);
    else byId('tip').hidden = true;
  }

  click(event) {
    const cell = this.cellOf(event);
    if (!cell) return;
    Object.assign(this, cell);
    this.show();
    this.does.choose(cell.row, cell.expert);
  }
}
