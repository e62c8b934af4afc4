/**
 * Where peers meet: a signalling service passes signed envelopes between those who are connected to it.
 *
 * Nothing that it says is believed: an answer counts when the peer that was dialled has signed it, for this exchange.
 */
import { SwarmError, within } from './errors.js'
import { short, verify } from './identity.js'

const PATH = '/swarmcore/signalling/1'
const DESCRIPTION = 'swarmcore webrtc description 1\0'
const REGISTRATION = 'swarmcore webrtc registration 1\0'
const TIMEOUT = 10
const MOST_CANDIDATES = 33
const ADDRESS = /^webrtc:(?:(wss?):)?\/\/([^/\s]+)\/(12D3Koo[1-9A-HJ-NP-Za-km-z]{45})$/
const encoder = new TextEncoder()

/** Read `webrtc://host:port/<peer id>`, or `webrtc:wss://…` with TLS. */
export function parseAddress (text) {
  const [whole, scheme, place, peer] = ADDRESS.exec(text.trim()) ?? []
  if (!whole) {
    throw new SwarmError('AddressError', `“${text}” is no address of a peer that a page can reach; ` +
      'expected webrtc://host:port/12D3Koo…')
  }
  return { url: `${scheme ?? 'ws'}://${place}${PATH}`, peer }
}

export class Signalling {
  #identity
  #socket
  #exchanges = new Map()

  constructor (identity, socket) {
    this.#identity = identity
    this.#socket = socket
    socket.onmessage = event => {
      this.#arrived(event.data).catch(error => console.warn('dropped what came by signalling:', error))
    }
    socket.onclose = () => {
      for (const { reject } of this.#exchanges.values()) reject(gone(socket.url))
    }
  }

  /** Register `identity` at the service. Throws a PeerUnreachableError when that does not work. */
  static async connect (url, identity) {
    let socket
    try {
      socket = new WebSocket(url)
    } catch (error) { // a page that came by https asks for ws://
      throw new SwarmError('PeerUnreachableError', `signalling service ${url}: ${error.message}`)
    }
    try {
      const { nonce } = await next(socket, 'challenge')
      const signature = await identity.sign(joined(encoder.encode(REGISTRATION), unbase64(nonce)))
      const registered = next(socket, 'registered')
      socket.send(JSON.stringify({ type: 'register', peer: identity.peer, signature: base64(signature) }))
      await registered
    } catch (error) {
      socket.close()
      throw error
    }
    return new Signalling(identity, socket)
  }

  get open () {
    return this.#socket.readyState === WebSocket.OPEN
  }

  /**
   * Send `offer`, a description, to `peer`, and wait for the description it answers. `onCandidate` gets each further
   * candidate of the peer's, also after that, until the exchange is given up with `forget(peer)`.
   */
  async exchange (peer, offer, onCandidate = () => {}) {
    const name = base64(crypto.getRandomValues(new Uint8Array(16)))
    const envelope = { sender: this.#identity.peer, receiver: peer, exchange: name, kind: 'offer', body: offer }
    const signature = base64(await this.#identity.sign(statement(envelope)))
    if (!this.open) throw gone(this.#socket.url)
    const answer = new Promise((resolve, reject) => this.#exchanges.set(name, { peer, resolve, reject, onCandidate }))
    this.#socket.send(JSON.stringify({ type: 'envelope', ...envelope, signature }))
    try {
      return await within(TIMEOUT, answer, `the answer of ${short(peer)}`)
    } catch (error) {
      this.#exchanges.delete(name)
      throw error
    }
  }

  /** No more candidates of `peer` are wanted. */
  forget (peer) {
    for (const [name, exchange] of this.#exchanges) if (exchange.peer === peer) this.#exchanges.delete(name)
  }

  close () {
    this.#socket.close()
  }

  async #arrived (text) {
    const signal = JSON.parse(text)
    const exchange = this.#exchanges.get(signal.exchange)
    if (exchange == null) return
    const peer = short(exchange.peer)
    if (signal.type === 'absent') {
      exchange.reject(new SwarmError('PeerUnreachableError', `${peer} cannot be reached: ${signal.reason}`))
      return
    }
    const meant = signal.receiver === this.#identity.peer && signal.sender === exchange.peer
    if (!meant || !await verify(signal.sender, statement(signal), unbase64(signal.signature))) {
      exchange.reject(new SwarmError('PeerIdentityError', `${peer} did not sign what came in its name; the ` +
        'signalling service misdirects, or has changed it'))
      return
    }
    if (signal.kind === 'answer') exchange.resolve(signal.body)
    if (signal.kind === 'candidate') signal.body.split('\n').slice(0, MOST_CANDIDATES).forEach(exchange.onCandidate)
    if (signal.kind === 'refusal') {
      exchange.reject(new SwarmError('PeerUnreachableError', `${peer} refuses: ${signal.body.slice(0, 200)}`))
    }
  }
}

/** What is signed of an envelope: each part behind its length. */
function statement ({ sender, receiver, exchange, kind, body }) {
  const parts = [unbase64(exchange), ...[sender, receiver, kind, body].map(text => encoder.encode(text))]
  return joined(encoder.encode(DESCRIPTION), ...parts.flatMap(part => {
    const length = new DataView(new ArrayBuffer(4))
    length.setUint32(0, part.length, true)
    return [new Uint8Array(length.buffer), part]
  }))
}

/** The next signal, which has to be of this type. */
function next (socket, type) {
  return within(TIMEOUT, new Promise((resolve, reject) => {
    const fail = () => reject(gone(socket.url))
    socket.onerror = socket.onclose = fail
    socket.onmessage = event => {
      const signal = JSON.parse(event.data)
      if (signal.type === type) resolve(signal)
      else fail()
    }
  }), `signalling service ${socket.url}`)
}

function gone (url) {
  return new SwarmError('PeerUnreachableError', `signalling service ${url} does not answer, or hung up`)
}

function joined (...parts) {
  return new Uint8Array(parts.flatMap(part => [...part]))
}

function base64 (bytes) {
  return btoa(String.fromCharCode(...bytes))
}

function unbase64 (text) {
  return Uint8Array.from(atob(text), character => character.charCodeAt(0))
}
