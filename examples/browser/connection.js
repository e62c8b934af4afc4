/** One peer connection to one peer, and a data channel in it for each stream. */
import { SwarmError, within } from './errors.js'
import { FramedStream, KEEPALIVE } from './framed.js'
import { short } from './identity.js'

const LABEL = '/swarmcore/stream/1'
const CONNECT_TIMEOUT = 15
const LOOK_MS = 1000
const SILENCE = 1.5 * KEEPALIVE // after that without a word a new path is looked for; a stream ends after three times

export class Connection {
  #rtc
  #meet
  #exchange
  #forget = () => {}
  #streams = new Set()
  #restarting = null
  #watching

  constructor (peer, iceServers, meet) {
    this.peer = peer
    this.#meet = meet
    this.#rtc = new RTCPeerConnection({ iceServers })
    // Both sides know of it without a word: an offer needs one channel, and this one is open at once.
    this.#rtc.createDataChannel('swarmcore', { negotiated: true, id: 0 })
  }

  /**
   * Throws a PeerUnreachableError, or what the peer or the signalling service has to say. For a new path later on, `meet`
   * gives a `Signalling` that is connected then.
   */
  static async dial (peer, signalling, iceServers = [], meet = async () => signalling) {
    const connection = new Connection(peer, iceServers, meet)
    try {
      await connection.#connect(signalling)
    } catch (error) {
      connection.close()
      throw error
    }
    return connection
  }

  get alive () {
    return this.#rtc.connectionState === 'connected' || this.#rtc.connectionState === 'disconnected'
  }

  /** A new stream. */
  async openStream () {
    if (!this.alive) throw new SwarmError('ConnectionLostError', `the connection to ${short(this.peer)} broke`)
    const stream = await FramedStream.open(this.#rtc.createDataChannel(LABEL))
    this.#streams.add(stream)
    return stream
  }

  /**
   * Look for a new path: the network has changed, or the peer is silent. Streams go on, by the old path for as long as
   * that works. Throws what hinders it; one at a time.
   */
  restart () {
    this.#restarting ??= this.#meet()
      .then(signalling => this.#agree('restart', signalling))
      .finally(() => { this.#restarting = null })
    return this.#restarting
  }

  close () {
    clearInterval(this.#watching)
    this.#forget()
    this.#rtc.close()
  }

  async #connect (signalling) {
    const rtc = this.#rtc
    const connected = new Promise((resolve, reject) => {
      rtc.onconnectionstatechange = () => {
        if (rtc.connectionState === 'connected') resolve()
        if (rtc.connectionState === 'failed') {
          reject(new SwarmError('PeerUnreachableError', `no path to ${short(this.peer)} was found`))
        }
      }
    })
    connected.catch(() => {}) // the exchange may fail first
    await this.#agree('offer', signalling)
    await within(CONNECT_TIMEOUT, connected, `connecting to ${short(this.peer)}`)
    rtc.onconnectionstatechange = () => {
      if (rtc.connectionState === 'disconnected') this.#lookForPath()
    }
    this.#watching = setInterval(() => this.#listenForSilence(), LOOK_MS)
  }

  /** Exchange descriptions, and candidates as they are found; the latter go on after that. */
  async #agree (kind, signalling) {
    const rtc = this.#rtc
    this.#forget()
    const exchange = this.#exchange = signalling.begin(this.peer, this.#exchange?.name)
    this.#forget = () => signalling.end(exchange)
    rtc.onicecandidate = ({ candidate }) => exchange.found(candidate)
    await rtc.setLocalDescription(await rtc.createOffer({ iceRestart: kind === 'restart' }))
    const answer = await exchange.agree(kind, rtc.localDescription.sdp)
    await rtc.setRemoteDescription({ type: 'answer', sdp: answer })
    exchange.onCandidate(candidate => addCandidate(rtc, candidate))
  }

  #listenForSilence () {
    for (const stream of this.#streams) if (stream.ended) this.#streams.delete(stream)
    const silence = Math.min(...[...this.#streams].map(stream => stream.silence))
    if (this.#streams.size > 0 && silence > SILENCE) this.#lookForPath()
  }

  #lookForPath () {
    if (this.alive) this.restart().catch(error => console.info(`no other path to ${short(this.peer)}:`, error))
  }
}

/** One of the peer's; nonsense, or one that comes too late, does no harm. */
function addCandidate (rtc, candidate) {
  const init = candidate.startsWith('candidate:') ? { candidate, sdpMLineIndex: 0 } : null
  rtc.addIceCandidate(init).catch(error => console.debug('left out a candidate:', error))
}
