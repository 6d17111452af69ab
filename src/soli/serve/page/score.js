/**
 * What the routers decided, token by token, in flat arrays that grow: a thousand tokens of 58 layers are 700,000
 * mentions of an expert, too many for objects. A mention is one expert named in one layer's decision about one token.
 */

/** How an expert is mentioned: it plays, plays because of the bias, is kept out by it, or was next in line. */
export const PLAYS = 0;
export const LET_IN = 1;
export const KEPT_OUT = 2;
export const NEAR = 3;

/** Where an expert was when it was needed, of a model that reads experts from disk; 0: nothing is said. */
export const TIERS = ['', 'memory', 'reading', 'disk'];

const COLUMNS = {
  layer: Uint16Array, expert: Uint16Array, kind: Uint8Array, tier: Uint8Array,
  weight: Float32Array, share: Float32Array, affinity: Float32Array, biased: Float32Array, margin: Float32Array,
};

export class Score {
  /** @param {{layers: string[], experts: number}} model */
  constructor(model) {
    this.model = model;
    this.rowOf = new Map(model.layers.map((name, row) => [name, row]));
    this.tokens = []; // {text, part, position}
    this.starts = [0]; // token t is mentions starts[t] up to starts[t + 1]
    this.groups = []; // per token: per layer the groups that survived, or null
    this.costs = []; // per token: per layer {waited (ms), bytes, tokens (that share them)}, or null
    this.allocate(1 << 12);
  }

  get length() { return this.tokens.length; }

  /** Adds one token as the server sends it. Layers this model does not have, and experts beyond its count, are refused. */
  add(token) {
    let at = this.starts[this.length];
    const groups = new Array(this.model.layers.length).fill(null);
    const costs = new Array(this.model.layers.length).fill(null);
    for (const layer of token.layers) {
      const row = this.rowOf.get(layer.layer);
      if (row === undefined) throw new Error(`unknown layer ${layer.layer}`);
      groups[row] = layer.groups ?? null;
      if (layer.waited_ms !== undefined) costs[row] = { waited: layer.waited_ms, bytes: layer.bytes_read, tokens: layer.pass_tokens };
      let total = 0;
      // Servers and recordings of Soli 0.1 named them players, let_in, kept_out and near_misses.
      const players = layer.selected ?? layer.players;
      for (const player of players) total += player.weight;
      for (const player of players) {
        const kind = player.promoted_by_bias ?? player.let_in ? LET_IN : PLAYS;
        at = this.put(at, row, kind, player, player.weight / (total || 1));
      }
      for (const out of layer.demoted_by_bias ?? layer.kept_out ?? []) at = this.put(at, row, KEPT_OUT, out, 0);
      for (const near of layer.runner_ups ?? layer.near_misses ?? []) at = this.put(at, row, NEAR, near, 0);
    }
    this.tokens.push({ text: token.text, part: token.part, position: token.position });
    this.groups.push(groups);
    this.costs.push(costs);
    this.starts.push(at);
  }

  put(at, row, kind, entry, share) {
    if (!(entry.expert < this.model.experts)) throw new Error(`unknown expert ${entry.expert}`);
    if (at === this.capacity) this.allocate(this.capacity * 2);
    this.layer[at] = row;
    this.expert[at] = entry.expert;
    this.kind[at] = kind;
    this.tier[at] = Math.max(0, TIERS.indexOf(entry.tier ?? ''));
    this.weight[at] = entry.weight ?? 0;
    this.share[at] = share;
    this.affinity[at] = entry.affinity ?? NaN;
    this.biased[at] = entry.biased;
    this.margin[at] = entry.margin ?? NaN;
    return at + 1;
  }

  allocate(capacity) {
    this.capacity = capacity;
    for (const [name, Kind] of Object.entries(COLUMNS)) {
      const wider = new Kind(capacity);
      if (this[name]) wider.set(this[name]);
      this[name] = wider;
    }
  }

  /** One layer's decision about token t, as objects, players heaviest first. */
  decision(t, row) {
    const decision = { players: [], keptOut: [], near: [], groups: this.groups[t][row], cost: this.costs[t][row] };
    for (let i = this.starts[t]; i < this.starts[t + 1]; i += 1) {
      if (this.layer[i] !== row) continue;
      const mention = {
        expert: this.expert[i], kind: this.kind[i], share: this.share[i], tier: TIERS[this.tier[i]],
        affinity: this.affinity[i], biased: this.biased[i], margin: this.margin[i],
      };
      [decision.players, decision.players, decision.keptOut, decision.near][mention.kind].push(mention);
    }
    decision.players.sort((a, b) => b.share - a.share);
    decision.last = Math.min(...decision.players.map((player) => player.biased)); // what a newcomer had to beat
    return decision;
  }

  /** Where the experts of token t were when it needed them: an index into TIERS for each cell. */
  tiersOf(t) {
    const cells = new Uint8Array(this.model.layers.length * this.model.experts);
    for (let i = this.starts[t]; i < this.starts[t + 1]; i += 1) {
      if (this.kind[i] <= LET_IN) cells[this.layer[i] * this.model.experts + this.expert[i]] = this.tier[i];
    }
    return cells;
  }

  /** How token t mentions one expert of a layer: {kind, share, tier} or null. Playing wins over being next in line. */
  mention(t, row, expert) {
    for (let i = this.starts[t]; i < this.starts[t + 1]; i += 1) {
      if (this.layer[i] === row && this.expert[i] === expert) {
        return { kind: this.kind[i], share: this.share[i], tier: TIERS[this.tier[i]] };
      }
    }
    return null;
  }
}
