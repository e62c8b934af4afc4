/** What the registry says: signed records of who serves what, kept until they expire. */
import { verify } from './identity.js'
import { parseAddress } from './signalling.js'
import { decode } from './msgpack.js'

const DOMAIN = new TextEncoder().encode('swarmcore registry record 1\0')
const MAX_PEERS = 10_000
const MAX_TTL = 3600

export class Records {
  #known = new Map()

  /** What peers announce of themselves, those without blocks included: `ServerInfo`s as plain objects. */
  get infos () {
    const now = performance.now()
    for (const [peer, { until }] of this.#known) {
      if (until < now) this.#known.delete(peer)
    }
    return [...this.#known.values()].flatMap(({ info }) => info ?? [])
  }

  /** Take what is newer than what is here. Whatever is malformed or not signed by its owner is dropped. */
  async take (records) {
    for (const record of records) {
      try {
        await this.#takeOne(record)
      } catch (error) {
        console.warn('dropped a record:', error)
      }
    }
  }

  /** The announcement with this number, which is as good as unique. */
  numbered (sequence) {
    return this.infos.find(info => this.#known.get(info.peer).sequence === sequence)
  }

  /** Show `peer` no more until it announces itself anew. */
  hide (peer) {
    const known = this.#known.get(peer)
    if (known) known.info = null
  }

  async #takeOne ({ payload, signature }) {
    const { peer, sequence, ttl, info } = decode(payload)
    const known = this.#known.get(peer)
    if (known ? known.sequence >= sequence : this.#known.size >= MAX_PEERS) return
    if (!await verify(peer, Uint8Array.of(...DOMAIN, ...payload), signature)) throw new Error('it is not signed')
    const sound = info == null || (info.peer === peer && Array.isArray(info.addresses))
    if (!sound || !(ttl > 0)) throw new Error('it is malformed')
    this.#known.set(peer, { sequence, info, until: performance.now() + 1000 * Math.min(ttl, MAX_TTL) })
  }
}

/** The first address under which a page reaches a peer; null when it has none. */
export function pageAddress (info) {
  for (const text of info.addresses) {
    try {
      const address = parseAddress(text)
      if (address.peer === info.peer) return address
    } catch {} // of another transport
  }
  return null
}
