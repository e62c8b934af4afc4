/** A swarm as a page sees it: its servers, the round trip to each, and text from those that make it for others. */
import { Connection } from './connection.js'
import { SwarmError, within } from './errors.js'
import { short } from './identity.js'
import { Records, pageAddress } from './records.js'
import { Channel, call } from './rpc.js'
import { Signalling, parseAddress } from './signalling.js'

const CALL_TIMEOUT = 10
const CHECK_TIMEOUT = 3
const SILENCE = 20 // a member that is watched says something every 5 s
const PIECE_TIMEOUT = 180 // a text may wait for its turn, and for servers that take over from others
const RETRY_MS = 2000
const DIGEST = new Uint8Array(256 * 8) // no hash of ours: all that the member has is news
const AHEAD = 64 // tokens that a generation server sends before it wants to hear that they were taken
const MAX_NEW_TOKENS = 256 // of an answer where the page asks for no other number
const MOST_CHARACTERS = 1024 // of text for each token: no tokenizer has longer ones
const MOST_EMPTY_PIECES = 64 // of one text that bring no token

/**
 * Fires `changed` when `servers` do; `state` when the member it follows is lost or found, `detail` says so; `head` when
 * a peer begins or goes on with a text, `detail` is its id.
 */
export class Swarm extends EventTarget {
  #identity
  #iceServers
  #entry
  #records = new Records()
  #signalling = new Map()
  #connections = new Map()
  #watched
  #closed = false
  #listening = new AbortController()

  constructor (identity, iceServers = []) {
    super()
    this.#identity = identity
    this.#iceServers = iceServers
    const { signal } = this.#listening
    for (const [network, type] of [[globalThis, 'online'], [navigator.connection, 'change']]) {
      network?.addEventListener(type, () => this.moved(), { signal })
    }
  }

  /** Join through any member, by its address `webrtc://host:port/<peer id>`. */
  async join (address) {
    this.#entry = parseAddress(address)
    const channel = await this.#watch(this.#entry)
    this.#follow(channel)
  }

  /** What peers announce of themselves: `ServerInfo`s as plain objects. */
  get servers () {
    return this.#records.infos
  }

  /** Peers that make text for a page. */
  get heads () {
    return this.servers.filter(info => info.heads?.length && info.state === 'online' && pageAddress(info))
  }

  /** Milliseconds from sending a few bytes to a server until they are back. */
  async ping (info) {
    const stream = await this.#openStream(info)
    const began = performance.now()
    await call(stream, '/swarmcore/ping/1', 'Ping', { payload: Uint8Array.of(1) }, 'Pong', CALL_TIMEOUT)
    return performance.now() - began
  }

  /**
   * Yield the pieces of the answer to `messages`, a chat as `[{role, content}]`. When a generation server is lost, another one
   * goes on with the text. `options` are further fields of the record `OpenGeneration`.
   */
  async * generate (messages, options = {}) {
    const tokens = []
    let tried = new Set()
    let failure = new SwarmError('MissingHeadError', 'no peer of this swarm makes text for pages; start one with ' +
      '--serve-head and --transport webrtc')
    for (;;) {
      const head = this.heads.find(info => !tried.has(info.peer))
      if (head == null) throw failure
      tried.add(head.peer)
      const before = tokens.length
      this.#tell('head', head.peer)
      try {
        yield * this.#generateAt(head, { ...options, messages }, tokens)
        return
      } catch (error) {
        if (error.name === 'InputError') throw error
        failure = error
        if (tokens.length > before) tried = new Set([head.peer])
      }
    }
  }

  /** The machine is on another network: look for new paths to all peers. What is under way goes on. */
  async moved () {
    for (const signalling of this.#signalling.values()) signalling.then(one => one.close(), () => {})
    const restarts = [...this.#connections.values()].map(async one => (await one).restart())
    for (const { reason } of await Promise.allSettled(restarts)) if (reason) console.info('no other path:', reason)
  }

  close () {
    this.#closed = true
    this.#listening.abort()
    this.#watched?.abort('the page has left')
    for (const connection of this.#connections.values()) connection.then(one => one.close(), () => {})
    for (const signalling of this.#signalling.values()) signalling.then(one => one.close(), () => {})
  }

  // --- texts ---------------------------------------------------------------------------------------------

  /** Add what comes to `tokens`, those that are there being the beginning of the answer. */
  async * #generateAt (head, request, tokens) {
    const stream = await this.#openStream(head)
    const most = request.max_new_tokens ?? MAX_NEW_TOKENS
    const opening = { ...request, max_new_tokens: most, default_length: request.max_new_tokens == null, so_far: [...tokens] }
    const channel = await Channel.open(stream, '/swarmcore/generate/1', 'OpenGeneration', opening)
    let taken = 0
    let told = 0
    let [characters, empty] = [0, 0]
    try {
      for (;;) {
        const { kind, record } = await channel.receive(PIECE_TIMEOUT)
        if (kind === 'GenerationEnded') {
          channel.close()
          return
        }
        if (kind !== 'TextPiece') continue // it has started
        taken += record.tokens.length
        characters += record.text.length
        if (record.tokens.length === 0) empty++
        if (empty > MOST_EMPTY_PIECES || characters > MOST_CHARACTERS * (taken + 1)) {
          throw new SwarmError('ProtocolError', 'the generation server sends text for no tokens')
        }
        const room = most - tokens.length
        tokens.push(...record.tokens.slice(0, room))
        yield record.text
        if (record.tokens.length > room) return // it does not stop by itself
        if (taken - told >= AHEAD / 4) {
          await channel.send('TokensTaken', { tokens: taken })
          told = taken
        }
      }
    } finally {
      channel.abort('nobody reads the text any more')
    }
  }

  // --- the registry --------------------------------------------------------------------------------------

  /** A channel on which a member tells what it knows, all of that already read. */
  async #watch (address) {
    const stream = await this.#stream(address)
    const channel = await Channel.open(stream, '/swarmcore/registry/watch/1', 'WatchRecords', { hashes: DIGEST })
    while (!await this.#readBatch(channel));
    return channel
  }

  async #follow (channel) {
    while (!this.#closed) {
      this.#watched = channel
      try {
        for (;;) await this.#readBatch(channel)
      } catch (error) {
        channel.abort('the page turned away')
        if (this.#closed) return
        this.#tell('state', `lost sight of the swarm: ${error.message}`)
      }
      channel = await this.#anotherMember()
    }
  }

  async #readBatch (channel) {
    const { record } = await channel.receive(SILENCE)
    await this.#records.take(record.records ?? [])
    this.#probe(record.suspected ?? new Uint8Array())
    this.#tell('changed')
    return record.complete !== false
  }

  /** See for ourselves whether those who may be dead are; whom a page cannot ask, it takes the member's word for. */
  #probe (entries) {
    const view = new DataView(entries.buffer, entries.byteOffset, entries.length)
    for (let at = 0; at + 16 <= entries.length; at += 16) {
      const suspect = this.#records.numbered(Number(view.getBigUint64(at + 8, true)))
      if (suspect == null) continue
      const asked = pageAddress(suspect) ? this.ping(suspect) : Promise.reject(new Error('no address for a page'))
      within(CHECK_TIMEOUT, asked, 'a sign of life').catch(() => {
        this.#records.hide(suspect.peer)
        this.#connections.get(suspect.peer)?.then(connection => connection.close(), () => {})
        this.#tell('changed')
      })
    }
  }

  async #anotherMember () {
    for (;;) {
      const addresses = [this.#entry, ...this.servers.flatMap(info => pageAddress(info) ?? [])]
      for (const address of addresses) {
        try {
          const channel = await this.#watch(address)
          this.#tell('state', `following ${short(address.peer)}`)
          return channel
        } catch (error) {
          console.info(`${short(address.peer)}:`, error)
          if (this.#closed) throw error
        }
      }
      await new Promise(resolve => setTimeout(resolve, RETRY_MS))
    }
  }

  #tell (type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }

  // --- connections ---------------------------------------------------------------------------------------

  #openStream (info) {
    const address = pageAddress(info)
    if (address) return this.#stream(address)
    throw new SwarmError('UnknownTransportError', `${short(info.peer)} has no address that a page can reach`)
  }

  async #stream ({ url, peer }) {
    if (this.#closed) throw new SwarmError('StreamClosedError', 'the page has left this swarm')
    const usable = connection => connection.alive
    const connection = await once(this.#connections, peer, usable, async () => {
      const connectSignalling = () => this.#connectSignalling(url)
      return Connection.dial(peer, await connectSignalling(), this.#iceServers, connectSignalling)
    })
    return connection.openStream()
  }

  #connectSignalling (url) {
    const registered = signalling => signalling.open
    return once(this.#signalling, url, registered, () => Signalling.connect(url, this.#identity))
  }
}

/** What is kept in `made` under `key`, or is being made; made anew when it failed, or is not `usable` any more. */
async function once (made, key, usable, make) {
  const before = made.get(key)
  const there = await before?.catch(() => null)
  if (there && usable(there)) return there
  if (made.get(key) === before) {
    there?.close()
    made.set(key, make())
  }
  return made.get(key)
}
